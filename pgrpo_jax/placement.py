"""Floor 5: from a configuration to the devices of learner and actors, and the weight versions between them."""

from typing import Any, Sequence

from pgrpo_jax import settings


def check_devices(config: Any, *, num_devices: int) -> None:
    """Refuses a learner that does not fit its devices.

    Args:
        config: checked by `settings.check`.
        num_devices: devices the learner may use, over all its processes.

    Raises:
        ConfigError: each line names a key, its value, the bound and what to do.
    """
    devices, mesh = config.learner.num_devices or num_devices, config.learner.mesh
    cut = mesh.fsdp * mesh.expert * mesh.tp
    per_slice = config.prompts_per_step // config.learner.micro_batches
    of_devices = "the learner's devices (learner.num_devices, 0 = all)"
    errors = settings.indivisible([(of_devices, devices, "learner.mesh.fsdp * learner.mesh.expert * learner.mesh.tp", cut)])
    shares = f"{of_devices} / learner.mesh.tp" if mesh.tp > 1 else of_devices
    errors += settings.indivisible([("prompts_per_step / learner.micro_batches", per_slice, shares, max(1, devices // mesh.tp))])
    if devices > num_devices:
        errors.append(f"learner.num_devices = {devices} is more than the {num_devices} devices there are: lower it, or 0 for all")
    if errors:
        raise settings.ConfigError("\n".join(errors))


def split_devices(config: Any, devices: Sequence[Any]) -> tuple[list[Any], list[list[Any]]]:
    """Returns (the learner's devices, each actor's) for the threads engine: actors get the last ones.

    Raises:
        ConfigError: there are too few.
    """
    wanted = config.num_actors * config.actor.tp
    if len(devices) <= wanted:
        raise settings.ConfigError(
            f"num_actors = {config.num_actors} with actor.tp = {config.actor.tp} leaves none of {len(devices)} devices to the learner: "
            "lower one of them, or set engine to inline"
        )
    rest = len(devices) - wanted
    return list(devices[:rest]), [list(devices[i : i + config.actor.tp]) for i in range(rest, len(devices), config.actor.tp)]


def versions_kept(config: Any) -> int:
    """Returns how many weight versions the parameter server holds at most: those that later steps need, and some on their way."""
    staleness = config.staleness
    return staleness.accept // staleness.reload + 4 if staleness.policy == "deterministic" else 16
