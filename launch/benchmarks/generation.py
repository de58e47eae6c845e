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


def engine_settings(job: Job) -> engine.GenerationSettings:
    """Returns what is generated: no token stops."""
    slots = SLOTS if job.ragged else 0
    return engine.GenerationSettings(
        max_new_tokens=job.new_tokens, support=Support(), stop_ids=(), pad_id=0, prompt_buckets=(job.prompt_tokens,), slots=slots
    )


def sampled(job: Job, model: transformer.Transformer, params: Any, seed: int, prompts: slice = slice(None)) -> engine.Completions:
    """Returns the completions of some of the job's prompts."""
    lengths = np.full(job.num_prompts, job.prompt_tokens, np.int32)[prompts]
    limits = job.limits(seed).reshape(job.num_prompts, -1)[prompts]
    named = {"completions_per_prompt": job.completions_per_prompt, "settings": engine_settings(job), "limits": limits}
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
    at_once = max(1, SLOTS // job.completions_per_prompt)

    def run(model: Any, params: Any, seed: int) -> None:
        for start in range(0, job.num_prompts, at_once):
            sampled(job, model, params, seed, slice(start, start + at_once))

    return _work(job, run)


def ceiling(job: Job) -> Callable[[int], dict[str, float]]:
    """Returns the work of a round at the ceiling, which knows no ragged jobs."""
    call = ceilings.decode(model_config(job), job)
    return lambda seed: {"generation_tokens_per_sec": job.num_sequences * job.new_tokens / secs(call)}
