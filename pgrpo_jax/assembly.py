"""Floor 5: from a checked configuration to the parts of a run, cheapest checks first."""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from pgrpo_jax import parallel, settings
from pgrpo_jax.actor import Actor
from pgrpo_jax.algorithms import reward_history
from pgrpo_jax.algorithms.advantages import ESTIMATORS
from pgrpo_jax.checkpoints import Checkpoints
from pgrpo_jax.generation.engine import bucket_length
from pgrpo_jax.learner import Learner, initial_state
from pgrpo_jax.models import tokenizer as tokenizers
from pgrpo_jax.models import transformer, weights
from pgrpo_jax.tasks import TASKS, Task

SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class Base:
    """The policy before training.

    Attributes:
        model: the network, as actors and evaluation run it.
        params: its parameters.
        tokenizer: its tokenizer and chat template.
        sha256: digest of the file the parameters come from; "random" without one.
    """

    model: transformer.Transformer
    params: Any
    tokenizer: tokenizers.Tokenizer
    sha256: str


def load_task(config: Any) -> Task:
    """Returns the task with its data prepared and checked.

    Raises:
        ValueError: a split has no prompts, a prompt's preference id is outside [0, K), or there are fewer held-out prompts than wanted.
        FileNotFoundError: the task's source files are missing.
    """
    task = TASKS[config.task.name](config.task.data_dir, seed=config.seed, num_preference_groups=config.task.num_preference_groups)
    check_task(task, num_held_out=config.evaluation.num_prompts)
    return task


def check_task(task: Task, *, num_held_out: int) -> None:
    """Refuses a task that would fail, or mislead, only once the devices are busy.

    Args:
        task: with its data prepared.
        num_held_out: prompts wanted for evaluation.

    Raises:
        ValueError: as `load_task`.
    """
    known = task.num_preference_groups
    for split in SPLITS:
        if (count := task.num_prompts(split)) < 1:
            raise ValueError(f"the {split} split has {count} prompts, at least 1 is needed: check the files in task.data_dir")
        for prompt in task.prompts(split, 0, count):
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
    """Loads tokenizer, checks that every prompt fits, and only then loads (or draws) the parameters.

    Raises:
        ValueError: a prompt is longer than the largest bucket, or bucket and answer exceed the model's context.
        FileNotFoundError: there is no model file.
    """
    dtype = jnp.dtype(config.model.dtype)
    if not config.model.path:
        tokenizer = tokenizers.ByteTokenizer()
        model_config = settings.random_model(config, tokenizer.vocab_size)
        _check_lengths(config, task, tokenizer, model_config.context_length)
        model = transformer.Transformer(model_config, dtype=dtype)
        key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(b"model.random"))
        return Base(model=model, params=transformer.initialise(model, key), tokenizer=tokenizer, sha256="random")
    model_config = weights.read_config(config.model.path)
    tokenizer = tokenizers.from_gguf(config.model.path)
    _check_lengths(config, task, tokenizer, model_config.context_length)
    _, params = weights.load_gguf(config.model.path)
    model = transformer.Transformer(model_config, dtype=dtype)
    return Base(model=model, params=jax.tree.map(jnp.asarray, params), tokenizer=tokenizer, sha256=weights.digest(config.model.path))


def _check_lengths(config: Any, task: Task, tokenizer: tokenizers.Tokenizer, context_length: int) -> None:
    buckets, answer = tuple(config.generation.prompt_buckets), config.generation.max_new_tokens
    for split in SPLITS:
        prompts = task.prompts(split, 0, task.num_prompts(split))
        longest = max(len(tokenizer.render_chat(p.text)) for p in prompts)
        padded = bucket_length(longest, buckets)
        if padded + answer > context_length:
            raise ValueError(
                f"prompts of {longest} tokens (bucket {padded}) and answers of generation.max_new_tokens = {answer} exceed the model's "
                f"context of {context_length} tokens: shorten one of them or add a smaller bucket to generation.prompt_buckets"
            )


def make_actor(config: Any, base: Base, task: Task) -> Actor:
    """Returns the actor that generates training rollouts."""
    return Actor(
        model=base.model,
        tokenizer=base.tokenizer,
        task=task,
        settings=settings.generation_settings(config, base.tokenizer),
        prompts_per_work=config.prompts_per_work,
        completions_per_prompt=config.completions_per_prompt,
        seed=config.seed,
    )


def make_evaluator(config: Any, base: Base, task: Task) -> Actor:
    """Returns the actor that answers held-out prompts: the same sampling, other sizes."""
    sizes = {"prompts_per_work": config.evaluation.prompts_per_work, "completions_per_prompt": config.evaluation.completions_per_prompt}
    return dataclasses.replace(make_actor(config, base, task), **sizes)


def make_learner(config: Any, base: Base, checkpoints: Checkpoints) -> Learner:
    """Returns the learner before its first update."""
    options, algorithm = settings.learner_settings(config, base.tokenizer), settings.preset(config)
    devices = jax.local_devices()[: config.learner.num_devices or None]
    kernel = parallel.advantage_kernel(ESTIMATORS[algorithm.advantage], devices, **settings.advantage_options(config))
    history = reward_history.init(config.task.num_preference_groups)
    return Learner(
        dataclasses.replace(base.model, remat=config.learner.remat) if config.learner.remat else base.model,
        initial_state(base.params, history, options.optimiser),
        advantage_kernel=kernel,
        settings=options,
        reference=base.params if algorithm.kl_coefficient else None,
        devices=devices,
        checkpoints=checkpoints,
    )


def run_identity(identity: dict[str, Any], base: Base) -> dict[str, Any]:
    """Returns what decides the trajectory: the identity keys of the configuration and the digest of the base model."""
    return identity | {"model.sha256": base.sha256}
