"""The actor role: prompts → completions → rewards. A rollout is a pure function of (weights, work)."""

import dataclasses
import time
from typing import Any, Mapping
import zlib

import jax
import numpy as np

from pgrpo_jax.generation import engine as generation
from pgrpo_jax.models import lora
from pgrpo_jax.models.tokenizer import Tokenizer
from pgrpo_jax.models.transformer import Transformer
from pgrpo_jax.structs import Prompt, Rollouts, Work
from pgrpo_jax.tasks import Task
from pgrpo_jax.verifiers import Judge


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much a unit of work holds.

    Attributes:
        prompts_per_work: P, prompts in a unit.
        completions_per_prompt: G.
    """

    prompts_per_work: int
    completions_per_prompt: int


@dataclasses.dataclass(frozen=True)
class Generated:
    """A unit that is generated and not judged yet; shapes as in `Rollouts`.

    Attributes:
        work: the unit.
        prompt_records: its P prompts.
        prompts: [P, Tp] int32, token ids.
        prompt_lengths: [P] int32, tokens.
        completions: the N = P * G completions, those of a prompt next to each other.
        texts: N decoded answers.
        secs: wall seconds spent generating.
    """

    work: Work
    prompt_records: tuple[Prompt, ...]
    prompts: np.ndarray
    prompt_lengths: np.ndarray
    completions: generation.Completions
    texts: tuple[str, ...]
    secs: float


@dataclasses.dataclass(frozen=True)
class Actor:
    """Generates and judges units of work. `judge` may run in one thread while `generate` runs in another.

    Attributes:
        model: the transformer.
        tokenizer: its tokenizer and chat template.
        task: prompts, and the names of the rewards' components.
        rewards: judges the answers.
        settings: what is generated.
        sizes: split -> how much a unit holds.
        seed: the run's seed; with the unit's split and index it names the random stream.
        frozen: parameters that are not trained and so are not among the weights of a version; {} where those are complete.
    """

    model: Transformer
    tokenizer: Tokenizer
    task: Task
    rewards: Judge
    settings: generation.GenerationSettings
    sizes: Mapping[str, Sizes]
    seed: int
    frozen: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def rollout(self, weights: Any, work: Work) -> Rollouts:
        """Generates and judges one unit.

        Args:
            weights: parameters of version `work.version`.
            work: the unit.

        Returns:
            Rollouts as `judge` makes them.
        """
        return self.judge(self.generate(weights, work))

    def generate(self, weights: Any, work: Work) -> Generated:
        """Samples the completions of a unit.

        Args:
            weights: parameters of version `work.version`, or what of them is trained.
            work: the unit.

        Raises:
            ValueError: there are no sizes for the unit's split, or a prompt is too long.
        """
        if work.split not in self.sizes:
            raise ValueError(f"work unit {work.index} is of split {work.split!r}, sizes are known for {sorted(self.sizes)}: give them")
        start, sizes = time.perf_counter(), self.sizes[work.split]
        records = self.task.prompts(work.split, work.index, sizes.prompts_per_work)
        prompts, lengths = generation.pad_prompts(
            [self.tokenizer.render_chat(p.text) for p in records], buckets=self.settings.prompt_buckets, pad_id=self.settings.pad_id
        )
        stream = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(f"rollouts/{work.split}".encode()))
        completions = generation.generate(
            self.model,
            lora.joined(self.frozen, weights),
            prompts,
            lengths,
            jax.random.fold_in(stream, work.index),
            completions_per_prompt=sizes.completions_per_prompt,
            settings=self.settings,
            adapters=lora.of_rows(self.model.config.lora, [p.preference_id for p in records]),
        )
        secs = time.perf_counter() - start
        texts = tuple(self.tokenizer.decode(row[:n]) for row, n in zip(completions.tokens, completions.lengths, strict=True))
        return Generated(
            work=work,
            prompt_records=tuple(records),
            prompts=prompts,
            prompt_lengths=lengths,
            completions=completions,
            texts=texts,
            secs=secs,
        )

    def judge(self, generated: Generated) -> Rollouts:
        """Rewards the completions of a unit.

        Args:
            generated: of `generate`.

        Returns:
            Rollouts of P prompts with G completions each, those of a prompt next to each other; completions whose reward failed
            under the policy "drop" are left out, so a prompt may have fewer, or none.

        Raises:
            ValueError: a reward failed under the policy "fail".
        """
        g, records, answers = generated, generated.prompt_records, generated.completions
        prompt_index = np.repeat(np.arange(len(records), dtype=np.int32), len(g.texts) // len(records))
        rewards, failures = self.rewards.judge([records[p] for p in prompt_index], g.texts, g.work.failed_rewards)
        kept = np.flatnonzero([reward is not None for reward in rewards])
        verdicts = [rewards[row] for row in kept]
        return Rollouts(
            work=g.work,
            prompt_records=records,
            prompts=g.prompts,
            prompt_lengths=g.prompt_lengths,
            completions=answers.tokens[kept],
            completion_lengths=answers.lengths[kept],
            prompt_index=prompt_index[kept],
            behaviour_log_probs=answers.log_probs[kept],
            truncated=answers.truncated[kept],
            texts=tuple(g.texts[row] for row in kept),
            rewards=np.array([v.total for v in verdicts], np.float32),
            reward_components={name: np.array([v.components[name] for v in verdicts], np.float32) for name in self.task.reward_components},
            reward_failures=failures,
            generation_secs=g.secs,
        )
