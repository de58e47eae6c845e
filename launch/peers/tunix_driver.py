"""Tunix's GRPOLearner with its plain sampler: one step a round, float32, KL to a reference, exactly as many new tokens as everybody samples.

Its Llama 3 rotates with a constant of its own; sizes of its batches count prompts; it takes prompts as text.
"""

import os
import time
from typing import Any, Callable, Iterator

import jax
import numpy as np
import optax
import protocol  # beside this file
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

_, JOB = protocol.asked()  # a step does it all, whatever the benchmark
MAX_STEPS = 1000
_NEVER = -1  # a token that is not sampled


class Numbers:
    """A tokenizer whose words are token ids; 0 as the first token of a text means that there is none."""

    def encode(self, text: str, **_: Any) -> list[int]:
        """Returns token ids."""
        return [int(word) for word in text.split()]

    def decode(self, ids: Any, **_: Any) -> str:
        """Returns text."""
        return " ".join(str(int(token)) for token in ids)

    def bos_id(self) -> int:
        """Returns the token before a text."""
        return 0

    def eos_id(self) -> int:
        """Returns the token that would end a completion; generation is told another."""
        return 1

    def pad_id(self) -> int:
        """Returns the token of padding."""
        return 0


def even_share(prompts: Any, completions: list[str], **_: Any) -> list[float]:
    """A trivial reward: the share of even tokens."""
    del prompts
    return [sum(word[-1] in "02468" for word in text.split()) / max(1, len(text.split())) for text in completions]


def make_model(seed: int) -> Any:
    """Returns a model whose matrices are all random: Tunix starts some at zero."""
    s = protocol.shape(JOB)
    config = llama3.ModelConfig(
        num_layers=s["num_hidden_layers"], vocab_size=s["vocab_size"], embed_dim=s["hidden_size"], hidden_dim=s["intermediate_size"],
        num_heads=s["num_attention_heads"], head_dim=s["head_dim"], num_kv_heads=s["num_key_value_heads"], rope_theta=s["rope_theta"],
        norm_eps=s["rms_norm_eps"], weight_tying=True,
    )  # fmt: skip
    graph, state = nnx.split(llama3.Llama3(config, rngs=nnx.Rngs(seed)))
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [x if x.ndim < 2 else 0.02 * jax.random.normal(key, x.shape, np.float32) for key, x in zip(keys, leaves, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, drawn))


class Turns:
    """Waits for its turn before each step of a learner, and answers after it."""

    def __init__(self):
        self._asked = protocol.rounds()
        self.seed: int | None = None  # of the round that is asked for and not yet done

    def wait(self) -> None:
        """Waits, unless a round is asked for already."""
        if self.seed is None:
            self.seed = next(self._asked, None)
        if self.seed is None:
            os._exit(0)  # nobody asks any more; the learner has no other way out

    def batches(self) -> Iterator[dict[str, Any]]:
        """Yields prompts; the first are taken before the first step."""
        while True:
            self.wait()
            yield {"prompts": np.array([" ".join(map(str, row)) for row in JOB.prompts(self.seed)])}

    def attach(self, cluster: Any, learner: Any) -> None:
        """Times generation, reward and steps."""
        secs = {"generation": 0.0, "reward": 0.0, "tokens": 0}
        step, generate, reward = learner._run_global_step, cluster.generate, learner._compute_rewards

        def timed(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
            def outer(*arguments: Any, **named: Any) -> Any:
                start = time.perf_counter()
                found = inner(*arguments, **named)
                secs[name] += time.perf_counter() - start
                if name == "generation":
                    secs["tokens"] += sum(len(tokens) for tokens in found.tokens)
                return found

            return outer

        def turn(*arguments: Any, **named: Any) -> None:
            self.wait()
            secs.update(generation=0.0, reward=0.0, tokens=0)
            start = time.perf_counter()
            step(*arguments, **named)
            jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
            self._answer(time.perf_counter() - start, **secs)

        cluster.generate, learner._compute_rewards = timed("generation", generate), timed("reward", reward)
        learner._run_global_step = turn

    def _answer(self, step: float, *, generation: float, reward: float, tokens: int) -> None:
        if tokens != JOB.num_sequences * JOB.new_tokens:
            raise ValueError(f"generated {tokens} tokens: not those that were asked for")
        self.seed = None
        protocol.answer(
            generation_tokens_per_sec=tokens / generation, step_secs=step, step_tokens_per_sec=tokens / step, learner_secs=step - generation - reward
        )


def main() -> None:
    """Trains, a step a round."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    with mesh:
        actor, reference = make_model(0), make_model(0)
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adamw(1e-6), eval_every_n_steps=10**6, max_steps=MAX_STEPS, mini_batch_size=JOB.num_prompts,
        train_micro_batch_size=JOB.prompts_per_slice, rollout_micro_batch_size=JOB.num_prompts, compute_logps_micro_batch_size=JOB.prompts_per_slice,
    )  # fmt: skip
    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=JOB.new_tokens, max_prompt_length=JOB.prompt_tokens, kv_cache_size=JOB.prompt_tokens + JOB.new_tokens, temperature=1.0,
        top_p=1.0, top_k=None, eos_tokens=[_NEVER],
    )  # fmt: skip
    roles = {role: mesh for role in (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)}
    config = rl_cluster.ClusterConfig(
        role_to_mesh=roles, rollout_engine="vanilla", offload_to_cpu=False, training_config=training, rollout_config=rollout
    )
    cluster = rl_cluster.RLCluster(actor=actor, reference=reference, tokenizer=Numbers(), cluster_config=config)
    algorithm = grpo_learner.GRPOConfig(num_generations=JOB.completions_per_prompt, num_iterations=1, beta=0.04, epsilon=0.2)
    learner = grpo_learner.GRPOLearner(rl_cluster=cluster, reward_fns=even_share, algo_config=algorithm)
    turns = Turns()
    turns.attach(cluster, learner)
    with mesh:
        learner.train(turns.batches())


if __name__ == "__main__":
    main()
