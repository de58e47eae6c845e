"""Seconds of an update, reference log-probs included, against the matmuls that it needs and against peers, in turn."""

from typing import Sequence

import jax
import numpy as np

from launch.benchmarks import ceilings, peers
from launch.benchmarks.timing import in_turn, ratios, secs
from launch.benchmarks.work import Job, MODEL
from pgrpo_jax import batching, parallel
from pgrpo_jax.algorithms import reward_history
from pgrpo_jax.algorithms.objective import Objective
from pgrpo_jax.generation.sampler import Support
from pgrpo_jax.models import transformer
from pgrpo_jax.structs import TrainBatch
from pgrpo_jax.train_state import initial_state
from pgrpo_jax.update import LossSettings, OptimiserSettings, score_slices, update

SLICES = 4  # micro-batches of whole prompts; the peers' are theirs
_OPTIMISER = OptimiserSettings(
    learning_rate=1e-6, schedule="constant", warmup_steps=0, num_updates=1000, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=1.0
)


def batch(job: Job, seed: int) -> TrainBatch:
    """Returns a batch of random completions, all of full length."""
    rng, shape = np.random.default_rng(seed), (job.num_sequences, job.new_tokens)
    return TrainBatch(
        prompts=job.prompts(seed), prompt_lengths=np.full(job.num_prompts, job.prompt_tokens, np.int32),
        preference_ids=np.zeros(job.num_prompts, np.int32), completions=rng.integers(10, MODEL.vocab_size, shape).astype(np.int32),
        completion_mask=np.ones(shape, bool), prompt_index=np.repeat(np.arange(job.num_prompts, dtype=np.int32), job.completions_per_prompt),
        behaviour_log_probs=np.full(shape, -10, np.float32), rewards=rng.random(job.num_sequences).astype(np.float32),
        valid=np.ones(job.num_sequences, bool),
    )  # fmt: skip


def measure(rounds: int, against: Sequence[str] = ()) -> dict[str, list[float]]:
    """Returns the seconds of everybody, our share of the ceiling and our multiple of each peer, round by round."""
    job = Job()
    model = transformer.Transformer(MODEL)
    mesh = parallel.make_mesh(jax.devices()[:1])
    reference = jax.device_get(transformer.initialise(model, jax.random.key(0)))
    held = {"state": initial_state(reference, reward_history.init(1, np.float32), _OPTIMISER, mesh, objective={"kl_coefficients": np.full(1, 0.04, np.float32)})}
    reference = parallel.place(reference, parallel.layout(reference, mesh))
    settings = LossSettings(objective=Objective(max_length=job.new_tokens), support=Support(), num_preference_groups=1)
    ceiling = ceilings.learn(MODEL, job, slices=SLICES)

    def learn(seed: int) -> None:
        sliced = parallel.shard_rows(batching.micro_batches(batch(job, seed), SLICES), mesh, axis=1)
        advantages = parallel.shard_rows(np.random.default_rng(seed).normal(size=(SLICES, job.num_sequences // SLICES)).astype(np.float32), mesh, axis=1)
        log_probs = score_slices(reference, model, settings.support, sliced)
        held["state"], metrics = update(held["state"], model, settings, _OPTIMISER, sliced, advantages, None, log_probs)
        jax.block_until_ready((held["state"], metrics))

    with jax.numpy_dtype_promotion("standard"), peers.started(against) as others:  # optax promotes implicitly
        times = in_turn(rounds, {
            "pgrpo_jax": lambda seed: secs(lambda: learn(seed)),
            "ceiling": lambda seed: secs(ceiling),
            **{name: lambda seed, peer=peer: peer.round(seed)["learner_secs"] for name, peer in others.items()},
        })  # fmt: skip
        return {
            **{f"{name}, s": values for name, values in times.items()},
            **{f"pgrpo_jax / {name}, speed": ratios(times[name], times["pgrpo_jax"]) for name in ("ceiling", *others)},
            **{f"{name}, peak memory, GiB": [peer.peak_gib] for name, peer in others.items()},
        }
