"""The actor role: prompts → completions → rewards. A rollout is a pure function of (weights, work)."""

import dataclasses
import time
import zlib
from typing import Any

import jax
import numpy as np

from pgrpo_jax.generation import engine as generation
from pgrpo_jax.models.tokenizer import Tokenizer
from pgrpo_jax.models.transformer import Transformer
from pgrpo_jax.structs import Rollouts, Work
from pgrpo_jax.tasks import Task


@dataclasses.dataclass(frozen=True)
class Actor:
    """Generates and judges units of work.

    Attributes:
        model: the transformer.
        tokenizer: its tokenizer and chat template.
        task: prompts and rewards.
        settings: what is generated.
        prompts_per_work: P, prompts in a unit.
        completions_per_prompt: G.
        seed: the run's seed; with the unit's split and index it names the random stream.
    """

    model: Transformer
    tokenizer: Tokenizer
    task: Task
    settings: generation.GenerationSettings
    prompts_per_work: int
    completions_per_prompt: int
    seed: int

    def rollout(self, weights: Any, work: Work) -> Rollouts:
        """Generates one unit.

        Args:
            weights: parameters of version `work.version`.
            work: the unit.

        Returns:
            Rollouts of P prompts with G completions each, the completions of a prompt next to each other.
        """
        start = time.perf_counter()
        records = self.task.prompts(work.split, work.index, self.prompts_per_work)
        prompts, lengths = generation.pad_prompts(
            [self.tokenizer.render_chat(p.text) for p in records], buckets=self.settings.prompt_buckets, pad_id=self.settings.pad_id
        )
        stream = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(f"rollouts/{work.split}".encode()))
        completions = generation.generate(
            self.model,
            weights,
            prompts,
            lengths,
            jax.random.fold_in(stream, work.index),
            completions_per_prompt=self.completions_per_prompt,
            settings=self.settings,
        )
        secs = time.perf_counter() - start
        prompt_index = np.repeat(np.arange(len(records), dtype=np.int32), self.completions_per_prompt)
        texts = tuple(self.tokenizer.decode(row[:n]) for row, n in zip(completions.tokens, completions.lengths, strict=True))
        verdicts = [self.task.reward(records[p], text) for p, text in zip(prompt_index, texts, strict=True)]
        return Rollouts(
            work=work,
            prompt_records=tuple(records),
            prompts=prompts,
            prompt_lengths=lengths,
            completions=completions.tokens,
            completion_lengths=completions.lengths,
            prompt_index=prompt_index,
            behaviour_log_probs=completions.log_probs,
            truncated=completions.truncated,
            texts=texts,
            rewards=np.array([v.total for v in verdicts], np.float32),
            reward_components={name: np.array([v.components[name] for v in verdicts], np.float32) for name in verdicts[0].components},
            generation_secs=secs,
        )
