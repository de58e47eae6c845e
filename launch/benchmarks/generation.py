"""Tokens per second of the generation engine, against the machine's ceiling and against peers, in turn."""

from typing import Sequence

import jax
import numpy as np

from launch.benchmarks import ceilings, peers
from launch.benchmarks.timing import in_turn, ratios, secs
from launch.benchmarks.work import Job, MODEL
from pgrpo_jax.generation import engine
from pgrpo_jax.generation.sampler import Support
from pgrpo_jax.models import transformer


def measure(rounds: int, against: Sequence[str] = ()) -> dict[str, list[float]]:
    """Returns tokens per second of everybody, our share of the ceiling and our multiple of each peer, round by round."""
    job = Job()
    model = transformer.Transformer(MODEL)
    params = transformer.initialise(model, jax.random.key(0))
    settings = engine.GenerationSettings(
        max_new_tokens=job.new_tokens, support=Support(), stop_ids=(), pad_id=0, prompt_buckets=(job.prompt_tokens,)
    )
    lengths = np.full(job.num_prompts, job.prompt_tokens, np.int32)
    ceiling = ceilings.decode(MODEL, job)

    def generate(seed: int) -> None:
        key = jax.random.key(seed)
        engine.generate(model, params, job.prompts(seed), lengths, key, completions_per_prompt=job.completions_per_prompt, settings=settings)

    tokens = job.num_sequences * job.new_tokens
    with peers.started(against) as others:
        speeds = in_turn(rounds, {
            "pgrpo_jax": lambda seed: tokens / secs(lambda: generate(seed)),
            "ceiling": lambda seed: tokens / secs(ceiling),
            **{name: lambda seed, peer=peer: peer.round(seed)["generation_tokens_per_sec"] for name, peer in others.items()},
        })  # fmt: skip
        return {
            **{f"{name}, tokens/s": values for name, values in speeds.items()},
            **{f"pgrpo_jax / {name}": ratios(speeds["pgrpo_jax"], speeds[name]) for name in ("ceiling", *others)},
            **{f"{name}, peak memory, GiB": [peer.peak_gib] for name, peer in others.items()},
        }
