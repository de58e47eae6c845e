"""Floor 5: from a configuration to checked settings. Below this module and `train.py` nothing sees a ConfigDict.

`check` reports every error of a configuration at once, before a device is touched.
"""

import math
from typing import Any, Sequence

from pgrpo_jax import algorithm_settings
from pgrpo_jax.generation.engine import GenerationSettings
from pgrpo_jax.generation.sampler import Support
from pgrpo_jax.kl_control import KLControl
from pgrpo_jax.learner_settings import LearnerSettings
from pgrpo_jax.models.config import ModelConfig
from pgrpo_jax.models.lora import Lora
from pgrpo_jax.models.quantised import STORAGE
from pgrpo_jax.models.tokenizer import Tokenizer
from pgrpo_jax.models.transformer import REMAT
from pgrpo_jax.optimiser import learning_rate, OptimiserSettings
from pgrpo_jax.schedule import Schedule
from pgrpo_jax.tasks import mixture
from pgrpo_jax.update import LossSettings
from pgrpo_jax.verifiers.rewards import POLICIES

ENGINES = ("inline", "threads", "ray", "replay")

_DTYPES = ("float32", "bfloat16")
_AT_LEAST = {
    "num_steps": 1,
    "prompts_per_step": 1,
    "prompts_per_work": 1,
    "task.num_preference_groups": 1,
    "model.random.num_layers": 1,
    "model.random.width": 1,
    "model.random.mlp_width": 1,
    "model.random.num_heads": 1,
    "model.random.num_kv_heads": 1,
    "model.random.context_length": 1,
    "generation.max_new_tokens": 1,
    "generation.top_k": 0,
    "generation.slots": 0,
    "lora.rank": 0,
    "optimiser.warmup_steps": 0,
    "optimiser.weight_decay": 0,
    "optimiser.clip_norm": 0,
    "learner.micro_batches": 1,
    "learner.passes_per_batch": 1,
    "learner.num_devices": 0,
    "learner.num_processes": 1,
    "learner.mesh.fsdp": 1,
    "learner.mesh.expert": 1,
    "learner.mesh.tp": 1,
    "num_actors": 1,
    "actor.tp": 1,
    "ray.object_store_bytes": 0,
    "checkpoint.must_save_by": 0,
    "checkpoint.save_every": 1,
    "checkpoint.keep": 1,
    "rewards.num_processes": 0,
    "evaluation.num_prompts": 1,
    "evaluation.completions_per_prompt": 1,
    "evaluation.prompts_per_work": 1,
    "metrics.samples_every": 0,
    "metrics.gradients_every": 0,
}
_ONE_OF = {
    "engine": ENGINES,
    "model.dtype": _DTYPES,
    "weights.dtype": _DTYPES,
    "generation.weights": STORAGE,
    "generation.cache": STORAGE,
    "learner.remat": tuple(REMAT),
    "rewards.on_failure": POLICIES,
}


class ConfigError(ValueError):
    """A configuration can not run; the message lists every reason, one a line."""


def check(config: Any) -> None:
    """Refuses a configuration that can not run anywhere; see placement.py for the devices it is to run on.

    Args:
        config: with every key of configs/base.py.

    Raises:
        ConfigError: each line names a key, its value, the bound and what to do.
    """
    errors = [
        f"{key} = {algorithm_settings.value_of(config, key)} is below {least}: set it to at least {least}"
        for key, least in _AT_LEAST.items()
        if not algorithm_settings.value_of(config, key) >= least
    ]
    errors += [
        f"{key} = {algorithm_settings.value_of(config, key)!r} is unknown: use one of {', '.join(known)}"
        for key, known in _ONE_OF.items()
        if algorithm_settings.value_of(config, key) not in known
    ]
    errors += _check_numbers(config) + algorithm_settings.faults(config)
    builders = (_task_weights, schedule, adapters, lambda c: learning_rate(optimiser_settings(c)), _random_model_if_any)
    for build in builders:
        try:
            build(config)
        except ValueError as error:
            errors.append(str(error))
    errors += indivisible([
        ("prompts_per_step", config.prompts_per_step, "prompts_per_work", config.prompts_per_work),
        ("prompts_per_step", config.prompts_per_step, "learner.micro_batches", config.learner.micro_batches),
        ("evaluation.num_prompts", config.evaluation.num_prompts, "evaluation.prompts_per_work", config.evaluation.prompts_per_work),
    ])  # fmt: skip
    errors += _check_engine(config)
    if errors:
        raise ConfigError("\n".join(errors))


def _check_numbers(config: Any) -> list[str]:
    g, buckets = config.generation, list(config.generation.prompt_buckets)
    tokens, of_a_prompt = config.learner.micro_batch_tokens, max(buckets, default=0) + config.completions_per_prompt * g.max_new_tokens
    rules = [
        (config.completions_per_prompt >= 2, "completions_per_prompt", config.completions_per_prompt,
         "below 2: one completion has nothing to be compared with; set it to at least 2"),
        (math.isfinite(g.temperature) and g.temperature > 0, "generation.temperature", g.temperature,
         "not above 0: use generation.top_k=1 for greedy answers"),
        (0 < g.top_p <= 1, "generation.top_p", g.top_p, "outside (0, 1]: 1 switches it off"),
        (bool(buckets) and buckets == sorted(set(buckets)) and buckets[0] >= 1, "generation.prompt_buckets", tuple(buckets),
         "not a rising list of lengths: for example (64, 128)"),
        (math.isfinite(config.optimiser.learning_rate) and config.optimiser.learning_rate > 0, "optimiser.learning_rate",
         config.optimiser.learning_rate, "not above 0: 1e-6 to 1e-4 are usual"),
        (0 <= config.optimiser.b1 < 1, "optimiser.b1", config.optimiser.b1, "outside [0, 1): 0.9 is usual"),
        (0 <= config.optimiser.b2 < 1, "optimiser.b2", config.optimiser.b2, "outside [0, 1): 0.99 is usual"),
        (config.optimiser.eps > 0, "optimiser.eps", config.optimiser.eps, "not above 0: AdamW would divide by 0; 1e-8 is usual"),
        (tokens == 0 or tokens >= of_a_prompt, "learner.micro_batch_tokens", tokens,
         f"below {of_a_prompt}, what a prompt of the last of generation.prompt_buckets and its completions_per_prompt * "
         "generation.max_new_tokens may have: raise it, or set it to 0 for no bound"),
        (0 < config.rewards.timeout_secs < math.inf, "rewards.timeout_secs", config.rewards.timeout_secs,
         "not above 0: every reward would fail; 30 is usual"),
        (config.lease_secs > 0, "lease_secs", config.lease_secs,
         "not above 0: every unit would be given up at once; several times what a unit takes is usual"),
    ]  # fmt: skip
    return [f"{key} = {value} is {problem}" for holds, key, value, problem in rules if not holds]


def indivisible(pairs: Sequence[tuple[str, int, str, int]]) -> list[str]:
    """Returns a line for each (name, value, name, divisor) whose value is no multiple."""
    return [f"{a} = {x} is not divisible by {b} = {y}: change one of them" for a, x, b, y in pairs if y >= 1 and x % y]


def _check_engine(config: Any) -> list[str]:
    """What only some engines can do."""
    engine, errors = config.engine, []
    if config.distributed.enabled and engine != "inline":
        errors.append(f"distributed.enabled = True needs engine = 'inline', not {engine!r}: Ray starts its processes itself")
    if (engine == "replay") != bool(config.replay.path):
        errors.append(f"engine = {engine!r} with replay.path = {config.replay.path!r}: recorded rollouts need engine = 'replay', and it needs a path")
    if config.distributed.enabled and config.learner.num_devices:
        errors.append("learner.num_devices is set with distributed.enabled = True, where the learner has all devices: leave it 0")
    if config.learner.num_processes > 1 and engine != "ray":
        errors.append(f"learner.num_processes = {config.learner.num_processes} needs engine = 'ray', not {engine!r}")
    return errors


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns a nested configuration as {dotted key: plain value}."""
    found = {}
    for key, value in config.items():
        plain = list(value) if isinstance(value, tuple) else value
        found |= flat(value, f"{prefix}{key}.") if hasattr(value, "items") else {f"{prefix}{key}": plain}
    return found


def schedule(config: Any) -> Schedule:
    """Returns which weight version generates which step."""
    s = config.staleness
    return Schedule(reload=s.reload, accept=s.accept, lag=s.lag, policy=s.policy)


def generation_settings(config: Any, tokenizer: Tokenizer) -> GenerationSettings:
    """Returns what is generated."""
    return GenerationSettings(
        max_new_tokens=config.generation.max_new_tokens,
        support=_support(config),
        stop_ids=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
        prompt_buckets=tuple(config.generation.prompt_buckets),
        slots=config.generation.slots,
        weights=config.generation.weights,
        cache=config.generation.cache,
    )


def _support(config: Any) -> Support:
    g = config.generation
    return Support(temperature=float(g.temperature), top_k=g.top_k, top_p=float(g.top_p))


def optimiser_settings(config: Any) -> OptimiserSettings:
    """Returns AdamW's settings; warm-up and schedule count optimiser steps, of which a batch makes `passes_per_batch`."""
    o, passes = config.optimiser, config.learner.passes_per_batch
    return OptimiserSettings(
        learning_rate=o.learning_rate,
        schedule=o.schedule,
        warmup_steps=o.warmup_steps * passes,
        num_updates=config.num_steps * passes,
        b1=o.b1,
        b2=o.b2,
        eps=o.eps,
        weight_decay=o.weight_decay,
        clip_norm=o.clip_norm,
        num_adapters=0 if (lora := adapters(config)) is None else lora.num_adapters,
    )


def num_preference_groups(config: Any) -> int:
    """Returns K over all tasks of a mixture; of one task, its own."""
    return config.task.num_preference_groups * len(_task_weights(config))


def _task_weights(config: Any) -> dict[str, int]:
    return mixture.parse(config.task.name)


def learner_settings(config: Any, tokenizer: Tokenizer) -> LearnerSettings:
    """Returns the learner's sizes and constants."""
    a, algorithm = config.algorithm, algorithm_settings
    loss = LossSettings(objective=algorithm.objective(config), support=_support(config), num_preference_groups=num_preference_groups(config))
    return LearnerSettings(
        num_steps=config.num_steps,
        schedule=schedule(config),
        num_preference_groups=num_preference_groups(config),
        completions_per_prompt=config.completions_per_prompt,
        micro_batches=config.learner.micro_batches,
        micro_batch_tokens=config.learner.micro_batch_tokens,
        packing=config.learner.packing,
        passes_per_batch=config.learner.passes_per_batch,
        pad_id=tokenizer.pad_id,
        loss=loss,
        optimiser=optimiser_settings(config),
        weights_dtype=config.weights.dtype,
        curation=algorithm.curation(config),
        oversample=algorithm.oversample(config),
        components=tuple(algorithm.components(config)),
        preference_weights=algorithm.preference_weights(config),
        kl=kl_control(config),
        proximal=a.proximal,
        gradients_every=config.metrics.gradients_every,
        dump_batches=tuple(config.metrics.dump_batches),
    )


def kl_control(config: Any) -> KLControl:
    """Returns how the KL to the reference is held."""
    a = config.algorithm
    coefficient = algorithm_settings.preset(config).kl_coefficient
    return KLControl(coefficient=coefficient, target=a.kl_target, horizon=a.kl_horizon, scope=a.kl_scope, refresh=a.reference_refresh)


def work_per_step(config: Any) -> int:
    """Returns how many units of work one update consumes."""
    return algorithm_settings.oversample(config) * config.prompts_per_step // config.prompts_per_work


def adapters(config: Any) -> Lora | None:
    """Returns the adapters that are trained in place of the model; None = the model itself is.

    Raises:
        ValueError: they can not be made.
    """
    a = config.lora
    if a.rank == 0:
        return None
    return Lora(
        rank=a.rank, alpha=a.alpha, targets=tuple(a.targets.split()), num_adapters=num_preference_groups(config) if a.per_preference_group else 1
    )


def random_model(config: Any, vocab_size: int) -> ModelConfig:
    """Returns the sizes of the randomly initialised model (model.random)."""
    r = config.model.random
    return ModelConfig(
        num_layers=r.num_layers,
        width=r.width,
        mlp_width=r.mlp_width,
        num_heads=r.num_heads,
        num_kv_heads=r.num_kv_heads,
        head_dim=r.width // r.num_heads,
        vocab_size=vocab_size,
        context_length=r.context_length,
        rope_theta=10000.0,
        norm_epsilon=1e-5,
        tied_embeddings=True,
    )


def _random_model_if_any(config: Any) -> ModelConfig | None:
    sizes = config.model.random
    drawn = not config.model.path and min(sizes.num_layers, sizes.width, sizes.num_heads, sizes.num_kv_heads) >= 1  # else already reported
    return random_model(config, 1) if drawn else None
