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


def engine_settings(job: Job) -> engine.GenerationSettings:
    """Returns what is generated: no token stops."""
    return engine.GenerationSettings(max_new_tokens=job.new_tokens, support=Support(), stop_ids=(), pad_id=0, prompt_buckets=(job.prompt_tokens,))


def sampled(job: Job, model: transformer.Transformer, params: Any, seed: int) -> engine.Completions:
    """Returns the job's completions."""
    lengths = np.full(job.num_prompts, job.prompt_tokens, np.int32)
    named = {"completions_per_prompt": job.completions_per_prompt, "settings": engine_settings(job)}
    return engine.generate(model, params, job.prompts(seed), lengths, jax.random.key(seed), **named)


def ours(job: Job) -> Callable[[int], dict[str, float]]:
    """Returns the work of a round.

    Raises:
        ValueError: the job is ragged.
    """
    if job.ragged:  # here `sampled` passes limits=job.limits(seed) once the engine takes it; then `contests.CONTESTS` lets us in
        raise ValueError("--ragged: the engine takes no limits yet: leave pgrpo_jax out")
    model = transformer.Transformer(model_config(job))
    params = transformer.initialise(model, jax.random.key(0))

    def work(seed: int) -> dict[str, float]:
        return {"generation_tokens_per_sec": int(job.limits(seed).sum()) / secs(lambda: sampled(job, model, params, seed))}

    return work


def ceiling(job: Job) -> Callable[[int], dict[str, float]]:
    """Returns the work of a round at the ceiling, which knows no ragged jobs."""
    call = ceilings.decode(model_config(job), job)
    return lambda seed: {"generation_tokens_per_sec": job.num_sequences * job.new_tokens / secs(call)}
