"""Tokens per second of the generation engine, and of the machine at its ceiling."""

from typing import Any, Callable

import jax
import numpy as np

from launch.benchmarks import ceilings
from launch.benchmarks.timing import secs
from launch.benchmarks.work import model_config
from launch.peers.job import Job
from pgrpo_jax.generation import engine
from pgrpo_jax.generation.sampler import Support
from pgrpo_jax.models import transformer


SLOTS = 64  # completions that a ragged job decodes at the same time; a peer's batch


def engine_settings(job: Job, **changes: Any) -> engine.GenerationSettings:
    """Returns what is generated: no token stops; `changes` of how."""
    values = {"support": Support(), "stop_ids": (), "pad_id": 0, "prompt_buckets": (job.prompt_tokens,), "slots": SLOTS if job.ragged else 0}
    return engine.GenerationSettings(max_new_tokens=job.new_tokens, **values | changes)


def sampled(
    job: Job, model: transformer.Transformer, params: Any, seed: int, prompts: slice = slice(None), **changes: Any
) -> engine.Completions:
    """Returns the completions of some of the job's prompts; `changes` of `engine_settings`."""
    lengths = np.full(job.num_prompts, job.prompt_tokens, np.int32)[prompts]
    limits = job.limits(seed).reshape(job.num_prompts, -1)[prompts]
    named = {"completions_per_prompt": job.completions_per_prompt, "settings": engine_settings(job, **changes), "limits": limits}
    out = engine.generate(model, params, job.prompts(seed)[prompts], lengths, jax.random.key(seed), **named)
    if out.lengths.tolist() != limits.reshape(-1).tolist():
        raise ValueError(f"generated {out.lengths.sum()} tokens: not the {limits.sum()} that were asked for")
    return out


def _work(job: Job, run: Callable[[Any, Any, int], object]) -> Callable[[int], dict[str, float]]:
    model = transformer.Transformer(model_config(job))
    params = transformer.initialise(model, jax.random.key(0))
    return lambda seed: {"generation_tokens_per_sec": int(job.limits(seed).sum()) / secs(lambda: run(model, params, seed))}


def ours(job: Job) -> Callable[[int], dict[str, float]]:
    """Returns the work of a round."""
    return _work(job, lambda model, params, seed: sampled(job, model, params, seed))


def batches(job: Job) -> Callable[[int], dict[str, float]]:
    """Returns the work of a round without refill: whole prompts, `SLOTS` completions at a time, each batch until its last has ended."""
    return _batches(job, smallest_batch=SLOTS)


def halved_batches(job: Job) -> Callable[[int], dict[str, float]]:
    """Returns the same work with batches that are halved as their completions end."""
    return _batches(job)


def _batches(job: Job, **changes: Any) -> Callable[[int], dict[str, float]]:
    at_once = max(1, SLOTS // job.completions_per_prompt)

    def run(model: Any, params: Any, seed: int) -> None:
        for start in range(0, job.num_prompts, at_once):
            sampled(job, model, params, seed, slice(start, start + at_once), **changes)

    return _work(job, run)


def bfloat16(job: Job) -> Callable[[int], dict[str, float]]:
    """Returns the work of a round with matrices and caches stored in bfloat16."""
    return _work(job, lambda model, params, seed: sampled(job, model, params, seed, weights="bfloat16", cache="bfloat16"))


def int8(job: Job) -> Callable[[int], dict[str, float]]:
    """Returns the work of a round with matrices and caches stored in int8."""
    return _work(job, lambda model, params, seed: sampled(job, model, params, seed, weights="int8", cache="int8"))


def ceiling(job: Job) -> Callable[[int], dict[str, float]]:
    """Returns the work of a round at the ceiling, which knows no ragged jobs."""
    call = ceilings.decode(model_config(job), job)
    return lambda seed: {"generation_tokens_per_sec": job.num_sequences * job.new_tokens / secs(call)}
