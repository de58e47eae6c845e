"""Floor 5: from a checked configuration to the parts of a run, cheapest checks first."""

import dataclasses
import functools
import hashlib
import itertools
import math
from typing import Any, Mapping, Sequence

from etils import epath
import jax
import jax.numpy as jnp

from pgrpo_jax import algorithm_settings, kl_control, parallel, settings
from pgrpo_jax.actor import Actor, Sizes
from pgrpo_jax.algorithms import memory
from pgrpo_jax.base_policy import Base
from pgrpo_jax.buckets import bucket_length
from pgrpo_jax.checkpoints import Checkpoints
from pgrpo_jax.learner import Learner
from pgrpo_jax.models import tokenizer as tokenizers
from pgrpo_jax.models import transformer, weights
from pgrpo_jax.models.parameters import frozen_shapes, sharding_faults, trainable_shapes
from pgrpo_jax.tasks import arms, curated, difficulty, mixture, Task
from pgrpo_jax.train_state import initial_state
from pgrpo_jax.verifiers import Judge
from pgrpo_jax.verifiers.rewards import RewardPool

SPLITS = ("train", "test")


def load_task(config: Any) -> Task:
    """Returns the task with its data prepared and checked.

    Raises:
        ValueError: a split has no prompts, a prompt's preference id is outside [0, K), or there are fewer held-out prompts than wanted.
        FileNotFoundError: the task's source files are missing.
    """
    task = mixture.load(
        config.task.name,
        config.task.data_dir,
        seed=config.seed,
        num_preference_groups=config.task.num_preference_groups,
        preference_groups=config.task.preference_groups,
    )
    check_task(task, num_held_out=config.evaluation.num_prompts)
    return _curated(config, arms.with_arm(task, config.algorithm.arm, config.seed))


def _curated(config: Any, task: Task) -> Task:
    c = config.curation
    return curated.curated(
        task,
        seed=config.seed,
        prompts_per_step=config.prompts_per_step,
        difficulty=difficulty.read(c.difficulty) if c.difficulty else None,
        min_mean=-math.inf if c.min_mean is None else c.min_mean,
        max_mean=math.inf if c.max_mean is None else c.max_mean,
        min_std=c.min_std,
        keep_unknown=c.keep_unknown,
        order=c.order,
        strata_floor=c.strata_floor,
    )


def check_task(task: Task, *, num_held_out: int) -> None:
    """Refuses a task that would fail, or mislead, only once the devices are busy.

    Args:
        task: with its data prepared.
        num_held_out: prompts wanted for evaluation.

    Raises:
        ValueError: as `load_task`.
    """
    for part, split in itertools.product(mixture.parts(task), SPLITS):
        known = part.num_preference_groups
        if (count := part.num_prompts(split)) < 1:
            raise ValueError(f"the {split} split has {count} prompts, at least 1 is needed: check the files in task.data_dir")
        for prompt in part.prompts(split, 0, count):
            if not 0 <= prompt.preference_id < known:
                raise ValueError(
                    f"prompt {prompt.prompt_id} has preference id {prompt.preference_id}, outside [0, {known}): "
                    "fix the task or set task.num_preference_groups"
                )
    if num_held_out > task.num_prompts("test"):
        raise ValueError(
            f"evaluation.num_prompts = {num_held_out} is above the task's {task.num_prompts('test')} held-out prompts: "
            "lower it, a prompt counted twice would narrow the intervals"
        )


def load_base(config: Any, task: Task) -> Base:
    """Loads the tokenizer, and checks that every prompt fits and that the model can be cut; no parameter is read yet.

    Args:
        config: every key of configs/base.py.
        task: its prompts are checked.

    Raises:
        ValueError: a prompt is longer than the largest bucket, bucket and answer exceed the model's context, or the model can not be
            cut over the devices of learner.mesh or actor.tp.
        FileNotFoundError: there is no model file.
    """
    path = config.model.path
    tokenizer = tokenizers.load(path) if path else tokenizers.ByteTokenizer()
    model_config = weights.read_config(path) if path else settings.random_model(config, tokenizer.vocab_size)
    _check_lengths(config, task, tokenizer, model_config.context_length)
    mesh = config.learner.mesh
    faults = sharding_faults(model_config, of="learner.mesh", fsdp=mesh.fsdp, tp=mesh.tp, expert=mesh.expert)
    faults += sharding_faults(model_config, of="actor", fsdp=1, tp=config.actor.tp)
    if faults:
        raise ValueError("\n".join(faults))
    model = transformer.Transformer(dataclasses.replace(model_config, lora=settings.adapters(config)), dtype=jnp.dtype(config.model.dtype))
    return Base(model=model, tokenizer=tokenizer, path=path, seed=config.seed, sha256=weights.digest(path) if path else "random")


def _check_lengths(config: Any, task: Task, tokenizer: tokenizers.Tokenizer, context_length: int) -> None:
    buckets, answer = tuple(config.generation.prompt_buckets), config.generation.max_new_tokens
    for part, split in itertools.product(mixture.parts(task), SPLITS):
        prompts = part.prompts(split, 0, part.num_prompts(split))
        longest = max(len(tokenizer.render_chat(p.text)) for p in prompts)
        padded = bucket_length(longest, buckets)
        if padded + answer > context_length:
            raise ValueError(
                f"prompts of {longest} tokens (bucket {padded}) and answers of generation.max_new_tokens = {answer} exceed the model's "
                f"context of {context_length} tokens: shorten one of them or add a smaller bucket to generation.prompt_buckets"
            )


def make_rewards(config: Any) -> RewardPool:
    """Returns what judges answers; its processes start in the background. Close it."""
    task = functools.partial(
        mixture.load_judge,
        config.task.name,
        config.task.data_dir,
        seed=config.seed,
        num_preference_groups=config.task.num_preference_groups,
        preference_groups=config.task.preference_groups,
    )
    rewards = config.rewards
    return RewardPool(task, num_processes=rewards.num_processes, timeout_secs=rewards.timeout_secs, on_failure=rewards.on_failure)


def make_actor(config: Any, base: Base, task: Task, rewards: Judge, *, frozen: Mapping[str, Any] = {}) -> Actor:
    """Returns the actor that generates training rollouts and answers held-out prompts: the same sampling, other sizes.

    Args:
        config: every key of configs/base.py.
        base: the policy before training.
        task: prompts.
        rewards: judges the answers.
        frozen: `base.frozen()` on the actor's devices; {} where the weights that it is handed are complete.
    """
    return Actor(
        model=base.model,
        tokenizer=base.tokenizer,
        task=task,
        rewards=rewards,
        settings=settings.generation_settings(config, base.tokenizer),
        sizes={
            "train": Sizes(prompts_per_work=config.prompts_per_work, completions_per_prompt=config.completions_per_prompt),
            "test": Sizes(
                prompts_per_work=config.evaluation.prompts_per_work, completions_per_prompt=config.evaluation.completions_per_prompt
            ),
        },
        seed=config.seed,
        frozen=frozen,
    )


def make_learner(config: Any, base: Base, checkpoints: Checkpoints, *, devices: Sequence[jax.Device] | None = None) -> Learner:
    """Returns the learner before its first update; with several processes each makes its part of it.

    Args:
        config: every key of configs/base.py.
        base: the policy before training.
        checkpoints: where the state is committed.
        devices: what the learner may use; None = all devices of all processes.
    """
    options, estimator = settings.learner_settings(config, base.tokenizer), algorithm_settings.advantage_settings(config)
    used = (devices or jax.devices())[: config.learner.num_devices or None]
    mesh = parallel.make_mesh(used, **config.learner.mesh)
    kernel = parallel.advantage_kernel(estimator, used, num_prompts=options.oversample * config.prompts_per_step)
    history = memory.init(estimator.memory, options.num_preference_groups, jnp.float32, num_components=len(options.components) or None)
    refreshed = options.kl.coefficient > 0 and options.kl.refresh > 0
    shardings, frozen_shardings = (parallel.layout(shapes(base.model.config), mesh) for shapes in (trainable_shapes, frozen_shapes))
    policy, frozen = base.trainable(shardings), base.frozen(frozen_shardings)
    state = initial_state(
        policy, history, options.optimiser, mesh,
        objective=kl_control.initial(options.kl, options.num_preference_groups), keep_reference=refreshed,
    )  # fmt: skip
    return Learner(
        dataclasses.replace(base.model, remat=config.learner.remat),
        state,
        advantage_kernel=kernel,
        settings=options,
        reference=(frozen or policy) if options.kl.coefficient > 0 and not refreshed else None,
        load_base=functools.partial(base.trainable, shardings),
        mesh=mesh,
        checkpoints=checkpoints,
        frozen=frozen,
    )


def run_identity(config: Any, identity: Mapping[str, Any], base: Base) -> dict[str, Any]:
    """Returns what decides the trajectory: the identity keys of the configuration, the digests of the base model and of the difficulty estimates."""
    estimates = config.curation.difficulty
    digest = hashlib.sha256(epath.Path(estimates).read_bytes()).hexdigest() if estimates else "none"
    return dict(identity) | {"model.sha256": base.sha256, "curation.difficulty.sha256": digest}
