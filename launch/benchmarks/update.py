"""Seconds of an update, reference log-probs included, and of the matmuls that it needs."""

from typing import Callable

import jax
import numpy as np

from launch.benchmarks import ceilings
from launch.benchmarks.timing import secs
from launch.benchmarks.work import model_config
from launch.peers.job import Job, VOCABULARY
from pgrpo_jax import batching, parallel
from pgrpo_jax.algorithms import reward_history
from pgrpo_jax.algorithms.objective import Objective
from pgrpo_jax.generation.sampler import Support
from pgrpo_jax.models import transformer
from pgrpo_jax.structs import TrainBatch
from pgrpo_jax.train_state import initial_state
from pgrpo_jax.optimiser import OptimiserSettings
from pgrpo_jax.update import LossSettings, score_slices, update

KL_COEFFICIENT = 0.04
OPTIMISER = OptimiserSettings(
    learning_rate=1e-6, schedule="constant", warmup_steps=0, num_updates=1000, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=1.0
)
TOKENS = 2304  # of one of our micro-batches at most, where a prompt has no more: 4 prompts of 64 tokens with 8 completions of 64


def learning_model(job: Job, remat: str = "keep_matmuls") -> transformer.Transformer:
    """Returns the model as the learner runs it: the backward pass finds what matmuls led to, and computes the rest anew; or another of `transformer.REMAT`."""
    return transformer.Transformer(model_config(job), remat=remat)


def batch(job: Job, seed: int) -> TrainBatch:
    """Returns a batch of random completions, of the job's lengths."""
    rng, shape = np.random.default_rng(seed), (job.num_sequences, job.new_tokens)
    return TrainBatch(
        prompts=job.prompts(seed), prompt_lengths=np.full(job.num_prompts, job.prompt_tokens, np.int32),
        preference_ids=np.zeros(job.num_prompts, np.int32), completions=rng.integers(10, VOCABULARY, shape).astype(np.int32),
        completion_mask=np.arange(job.new_tokens)[None, :] < job.limits(seed)[:, None],
        prompt_index=np.repeat(np.arange(job.num_prompts, dtype=np.int32), job.completions_per_prompt),
        behaviour_log_probs=np.full(shape, -10, np.float32), rewards=rng.random(job.num_sequences).astype(np.float32),
        valid=np.ones(job.num_sequences, bool),
    )  # fmt: skip


def ours(job: Job) -> Callable[[int], dict[str, float]]:
    """Returns the work of a round, ragged completions packed."""
    return _work(job, batching.pack)


def unpacked(job: Job) -> Callable[[int], dict[str, float]]:
    """Returns the work of a round with a row for each completion."""
    return _work(job, lambda batch: batch)


def _work(job: Job, arrange: Callable[[TrainBatch], TrainBatch]) -> Callable[[int], dict[str, float]]:
    model = learning_model(job)
    mesh = parallel.make_mesh(jax.devices()[:1])
    reference = jax.device_get(transformer.initialise(model, jax.random.key(0)))
    objective = {"kl_coefficients": np.full(1, KL_COEFFICIENT, np.float32)}
    held = {"state": initial_state(reference, reward_history.init(1, np.float32), OPTIMISER, mesh, objective=objective)}
    reference = parallel.place(reference, parallel.layout(reference, mesh))
    settings = LossSettings(objective=Objective(max_length=job.new_tokens), support=Support(), num_preference_groups=1)

    def learn(seed: int) -> None:
        whole = arrange(batch(job, seed))
        count = batching.num_slices(whole, at_least=1, most_tokens=TOKENS, devices=1)
        sliced = parallel.shard_rows(batching.micro_batches(whole, count), mesh, axis=1)
        advantages = parallel.shard_rows(np.random.default_rng(seed).normal(size=(count, job.num_sequences // count)).astype(np.float32), mesh, axis=1)
        log_probs = score_slices(reference, model, settings.support, sliced)
        held["state"], metrics = update(held["state"], model, settings, OPTIMISER, sliced, advantages, None, log_probs)
        jax.block_until_ready((held["state"], metrics))

    return lambda seed: {"learner_secs": secs(lambda: learn(seed))}


def ceiling(job: Job) -> Callable[[int], dict[str, float]]:
    """Returns the work of a round at the ceiling."""
    call = ceilings.learn(model_config(job), job, slices=job.num_prompts // job.prompts_per_slice)  # smaller parts suit it better
    return lambda seed: {"learner_secs": secs(call)}
