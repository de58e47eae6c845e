"""Seconds of a whole GRPO step: generation, a trivial reward, and the learner's own update with reference log-probs."""

import pathlib
import tempfile
import time
from typing import Any, Callable

import jax
import numpy as np

from launch.benchmarks import ceilings, generation
from launch.benchmarks.timing import secs
from launch.benchmarks.update import KL_COEFFICIENT, learning_model, OPTIMISER, TOKENS
from launch.benchmarks.work import model_config
from launch.peers.job import Job
from pgrpo_jax import kl_control, parallel
from pgrpo_jax.algorithms import memory
from pgrpo_jax.algorithms.advantages import AdvantageSettings
from pgrpo_jax.algorithms.objective import Objective
from pgrpo_jax.checkpoints import Checkpoints
from pgrpo_jax.curation import Curation
from pgrpo_jax.generation.engine import Completions
from pgrpo_jax.generation.sampler import Support
from pgrpo_jax.kl_control import KLControl
from pgrpo_jax.learner import Learner
from pgrpo_jax.learner_settings import LearnerSettings
from pgrpo_jax.models import transformer
from pgrpo_jax.schedule import Schedule
from pgrpo_jax.structs import Prompt, Rollouts, Work
from pgrpo_jax.train_state import initial_state
from pgrpo_jax.update import LossSettings

PREFERENCE_GROUPS = 4
_KL = KLControl(coefficient=KL_COEFFICIENT)


def learner_settings(job: Job) -> LearnerSettings:
    """Returns P-GRPO, strictly on-policy, a constant KL coefficient; half an update's micro-batches, as a step holds more beside them."""
    loss = LossSettings(objective=Objective(max_length=job.new_tokens), support=Support(), num_preference_groups=PREFERENCE_GROUPS)
    return LearnerSettings(
        num_steps=OPTIMISER.num_updates, schedule=Schedule(), num_preference_groups=PREFERENCE_GROUPS, micro_batches=1,
        completions_per_prompt=job.completions_per_prompt, passes_per_batch=1, pad_id=0, loss=loss, optimiser=OPTIMISER, weights_dtype="float32",
        curation=Curation(prompts_per_step=job.num_prompts, max_new_tokens=job.new_tokens), kl=_KL, micro_batch_tokens=TOKENS // 2,
    )  # fmt: skip


def make_learner(job: Job, model: transformer.Transformer, directory: pathlib.Path) -> Learner:
    """Returns a learner of random weights, which saves nothing.

    Args:
        job: what it is fed with.
        model: the transformer.
        directory: where its checkpoints would be.
    """
    mesh, devices = parallel.make_mesh(jax.devices()[:1]), jax.devices()[:1]
    estimator = AdvantageSettings()

    def initial() -> Any:
        return transformer.initialise(model, jax.random.key(0))

    params = initial()
    history = memory.init(estimator.memory, PREFERENCE_GROUPS, np.float32)
    state = initial_state(params, history, OPTIMISER, mesh, objective=kl_control.initial(_KL, PREFERENCE_GROUPS))
    return Learner(
        model, state, advantage_kernel=parallel.advantage_kernel(estimator, devices, num_prompts=job.num_prompts), settings=learner_settings(job),
        reference=params, load_base=initial, mesh=mesh, checkpoints=Checkpoints(directory, identity={}),
    )  # fmt: skip


def rollouts(job: Job, done: Completions, *, step: int, seed: int) -> Rollouts:
    """Returns the unit of a step, rewarded with the share of even tokens."""
    even = (done.tokens % 2 == 0) & (np.arange(job.new_tokens) < done.lengths[:, None])
    records = tuple(Prompt(f"{seed}/{p}", "", p % PREFERENCE_GROUPS, {}) for p in range(job.num_prompts))
    return Rollouts(
        work=Work(index=step, step=step, version=step), prompt_records=records, prompts=job.prompts(seed),
        prompt_lengths=np.full(job.num_prompts, job.prompt_tokens, np.int32), completions=done.tokens, completion_lengths=done.lengths,
        prompt_index=np.repeat(np.arange(job.num_prompts, dtype=np.int32), job.completions_per_prompt), behaviour_log_probs=done.log_probs,
        truncated=done.truncated, texts=("",) * job.num_sequences, rewards=(even.sum(axis=1) / done.lengths).astype(np.float32), reward_components={},
    )  # fmt: skip


def ours(job: Job) -> Callable[[int], dict[str, Any]]:
    """Returns the work of a round: a step of the learner, on completions of its newest weights."""
    model = learning_model(job, "keep_nothing")
    learner = make_learner(job, model, pathlib.Path(tempfile.mkdtemp()))

    def work(seed: int) -> dict[str, Any]:
        start = time.perf_counter()
        done = generation.sampled(job, model, learner.versions[learner.step], seed)
        generated = time.perf_counter()
        learner.update([rollouts(job, done, step=learner.step, seed=seed)])
        jax.block_until_ready((learner.state, learner.versions))
        end = time.perf_counter()
        tokens = int(done.lengths.sum())
        return {
            "step_secs": end - start, "step_tokens_per_sec": tokens / (end - start), "learner_secs": end - generated,
            "generation_tokens_per_sec": tokens / (generated - start),
        }  # fmt: skip

    return work


def ceiling(job: Job) -> Callable[[int], dict[str, float]]:
    """Returns the work of a round at the ceiling: that of generation and that of the update, one after the other."""
    config = model_config(job)
    decode, learn = ceilings.decode(config, job), ceilings.learn(config, job, slices=job.num_prompts // job.prompts_per_slice)

    def work(seed: int) -> dict[str, float]:
        del seed
        taken = secs(lambda: (decode(), learn()))
        return {"step_secs": taken, "step_tokens_per_sec": job.num_sequences * job.new_tokens / taken}

    return work
