"""Floor 5: where the roles of a run live, one function for each value of `engine`. The loop in train.py sees a learner and an engine."""

import contextlib
import dataclasses
import functools
import json
import os
import tempfile
from typing import Any, Mapping, Sequence, TextIO

import jax
from etils import epath

from pgrpo_jax import assembly, compile_cache, parallel, placement, preemption
from pgrpo_jax.actor import Actor
from pgrpo_jax.base_policy import Base
from pgrpo_jax.checkpoints import Checkpoints
from pgrpo_jax.engines import Engine
from pgrpo_jax.engines.inline import InlineEngine
from pgrpo_jax.engines.replay import ReplayEngine
from pgrpo_jax.engines.threads import ThreadsEngine
from pgrpo_jax.exchange import CollectiveStop, Exchange
from pgrpo_jax.learner import Learner
from pgrpo_jax.models import lora
from pgrpo_jax.models.parameters import frozen_shapes, trainable_shapes
from pgrpo_jax.parameter_server import ParameterServer
from pgrpo_jax.preemption import Stop
from pgrpo_jax.record import differences
from pgrpo_jax.rollout_files import find_rollouts
from pgrpo_jax.run_directory import check_workdir, RunDirectory
from pgrpo_jax.structs import RewardFailure
from pgrpo_jax.tasks import Task


@dataclasses.dataclass(frozen=True)
class Deployment:
    """The parts of a run, in place.

    Attributes:
        learner: a `Learner` of this process, or the handle of a gang of processes with the same methods.
        engine: runs the actors.
        task: prompts, and what the evaluation needs.
        directory: the run's records; those of process 0 where the run is one SPMD program over several, the others' are thrown away.
        stop: what ends waits; of all processes, where this is one of several.
        console_stream: where to show the run; None = standard output.
        exchange: reaches the other processes of the program; None where there are none.
        resources: what is closed, last opened first, when the run ends.
    """

    learner: Any
    engine: Engine
    task: Task
    directory: RunDirectory
    stop: Stop | CollectiveStop
    console_stream: TextIO | None = None
    exchange: Exchange | None = None
    resources: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)

    def agree(self, value: Any) -> Any:
        """Returns process 0's value, JSON-serialisable, in every process: only process 0 reads the run's records."""
        if self.exchange is None:
            return value
        return json.loads(self.exchange.gather("records", json.dumps(value).encode())[0])

    def verdicts(self, split: str) -> dict[tuple[int, int], tuple[RewardFailure, ...]]:
        """Returns the rewards that failed before, by (unit, weight version): units that are made again repeat them."""
        found = [[*unit, [vars(failure) for failure in failures]] for unit, failures in self.directory.verdicts(split).items()]
        return {(i, v): tuple(RewardFailure(**failure) for failure in failures) for i, v, failures in self.agree(found)}

    def close(self) -> None:
        """Ends every process and thread of the run, and lets go of its files."""
        self.resources.close()


def deploy(
    config: Any, *, identity: Mapping[str, Any], workdir: epath.PathLike, stop: Stop, engine: str = "", read_only: bool = False
) -> Deployment:
    """Puts the roles where `config.engine` says; cheapest checks first.

    Args:
        config: every key of configs/base.py, checked.
        identity: its identity keys, flat.
        workdir: the run directory.
        stop: set by signals to this process.
        engine: instead of the configuration's.
        read_only: beside a process that trains: checkpoints are read, never made or tidied up.

    Returns:
        The deployment; its learner is neither restored nor published.

    Raises:
        ValueError: the data, the model or the devices do not fit the configuration.
        Preempted: a stop was requested.
    """
    check_workdir(workdir)
    with contextlib.ExitStack() as resources:
        wanted = _Wanted(config, identity, epath.Path(workdir), stop, read_only, resources)
        parts = {"inline": _inline, "replay": _replay, "threads": _threads, "ray": _ray}[engine or config.engine](wanted)
        return dataclasses.replace(parts, resources=resources.pop_all())


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """The arguments of `deploy`, and what has been opened so far."""

    config: Any
    identity: Mapping[str, Any]
    workdir: epath.Path
    stop: Stop | CollectiveStop
    read_only: bool
    resources: contextlib.ExitStack


def _inline(wanted: _Wanted) -> Deployment:
    """All in this process; with `distributed.enabled` it is one of several that run the same program."""
    config, exchange, stream, records = wanted.config, None, None, wanted.workdir
    if config.distributed.enabled:
        _join_program(config.distributed)
        exchange = Exchange(timeout_secs=config.lease_secs)
        wanted = dataclasses.replace(wanted, stop=CollectiveStop(wanted.stop, exchange))
        if exchange.process > 0:
            records = wanted.resources.enter_context(tempfile.TemporaryDirectory())
            stream = wanted.resources.enter_context(open(os.devnull, "w"))
    task, base, learner = _local_learner(wanted, devices=None)
    localise = functools.partial(parallel.localise, model=base.model.config, devices=jax.local_devices()[: config.actor.tp])
    engine = InlineEngine(_local_actor(wanted, base, task, frozen=localise(learner.frozen)), localise=localise, exchange=exchange)
    wanted.resources.callback(engine.close)
    return Deployment(learner, engine, task, _records(wanted, records), wanted.stop, stream, exchange)


def _replay(wanted: _Wanted) -> Deployment:
    """As inline, but training units are not generated: they are those that another run recorded.

    Under "deterministic" they stand for what this run would generate, which they are only where all that decides the trajectory is equal. Under
    "freshest" they are off-policy data: the log-probs of the policy that generated them stand for the old policy's.
    """
    config, relabel = wanted.config, wanted.config.staleness.policy == "freshest"
    files = find_rollouts(config.replay.path)
    earlier = RunDirectory(config.replay.path).config() or {}
    different = differences(earlier, wanted.identity, but=("replay.path",))
    if different and not relabel:
        raise ValueError(
            f"replay.path = {config.replay.path} was recorded under another configuration ({'; '.join(different)}), so its rollouts are not those of "
            "this run: set staleness.policy to freshest and staleness.accept to 0 to train on them off-policy"
        )
    parts = _inline(wanted)
    engine = ReplayEngine(files, relabel=relabel, task=parts.task, others=parts.engine)
    return dataclasses.replace(parts, engine=engine)


def _threads(wanted: _Wanted) -> Deployment:
    """Actors on the last local devices, the learner on the others."""
    learner_devices, actor_devices = placement.split_devices(wanted.config, jax.local_devices())
    task, base, learner = _local_learner(wanted, devices=learner_devices)

    def place(weights: Any, devices: Sequence[jax.Device]) -> Any:
        return parallel.localise(weights, model=base.model.config, devices=devices)

    frozen = {tuple(devices): place(learner.frozen, devices) for devices in actor_devices}  # once on every device set

    def complete(weights: Any, devices: Sequence[jax.Device]) -> Any:
        return lora.joined(frozen[tuple(devices)], place(weights, devices))

    engine = ThreadsEngine(_local_actor(wanted, base, task), actor_devices=actor_devices, place=complete, stop=wanted.stop)
    wanted.resources.callback(engine.close)
    return Deployment(learner, engine, task, _records(wanted, wanted.workdir), wanted.stop)


def _ray(wanted: _Wanted) -> Deployment:
    """Actors and learner as processes of a Ray cluster; this process drives, and touches no accelerator."""
    from pgrpo_jax.engines import ray_actor, ray_cluster, ray_engine, ray_learner  # here: the other engines do without

    jax.config.update("jax_platforms", "cpu")
    config, ray, stop, resources = wanted.config, wanted.config.ray, wanted.stop, wanted.resources
    task = assembly.load_task(config)
    stop.check("start-up")
    cluster = ray_cluster.Cluster(ray.address, object_store_bytes=ray.object_store_bytes)
    resources.callback(cluster.close)
    stop.check("start-up")
    size = config.learner.num_processes
    gang_settings = ray_learner.GangSettings(
        place=ray_cluster.placements(ray.learner_slice, size, timeout_secs=ray.start_secs),
        num_processes=size,
        resources=ray_cluster.resources(ray.learner_resources),
        start_secs=ray.start_secs,
        call_secs=ray.call_secs,
    )
    make_learner = functools.partial(build_learner, config, dict(wanted.identity), wanted.workdir)
    gang = ray_learner.LearnerGang(make_learner, gang_settings, stop, checksums=config.weights.checksums)
    resources.callback(gang.close)
    actor_settings = ray_actor.RayActorSettings(
        num_actors=config.num_actors,
        place=ray_cluster.placements(ray.actor_slice, 1, timeout_secs=ray.start_secs),
        resources=ray_cluster.resources(ray.actor_resources),
        start_secs=ray.start_secs,
        unit_secs=2 * config.lease_secs,
        fetch_secs=ray.fetch_secs,
        verify=config.weights.checksums,
    )
    server = ParameterServer(ray_cluster.RayBlobStore(), keep=placement.versions_kept(config))
    engine = ray_engine.RayEngine(functools.partial(build_actor, config, wanted.workdir), actor_settings, server, stop)
    resources.callback(engine.close)
    return Deployment(gang, engine, task, _records(wanted, wanted.workdir), stop)


def build_learner(config: Any, identity: Mapping[str, Any], workdir: epath.Path) -> Learner:
    """Makes the learner in a member of the gang; its checkpoints close with it."""
    compile_cache.use(config.compile_cache, workdir=workdir)
    task = assembly.load_task(config)
    placement.check_devices(config, num_devices=len(jax.devices()))
    base = assembly.load_base(config, task)
    return assembly.make_learner(config, base, _checkpoints(config, identity, base, workdir))


def build_actor(config: Any, workdir: epath.Path) -> tuple[Actor, Any]:
    """Makes the actor in an actor process; returns it and what its weights look like there. Its rewards end with the process."""
    compile_cache.use(config.compile_cache, workdir=workdir)
    task = assembly.load_task(config)
    base = assembly.load_base(config, task)
    held = functools.partial(parallel.actor_shardings, model=base.model.config, devices=jax.local_devices()[: config.actor.tp])
    frozen = base.frozen(jax.tree.map(lambda like: like.sharding, held(frozen_shapes(base.model.config))))
    actor = assembly.make_actor(config, base, task, assembly.make_rewards(config), frozen=frozen)
    published = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, config.weights.dtype), trainable_shapes(base.model.config))
    return actor, held(published)


def _local_learner(wanted: _Wanted, *, devices: Sequence[jax.Device] | None) -> tuple[Task, Base, Learner]:
    config, stop = wanted.config, wanted.stop
    placement.check_devices(config, num_devices=len(devices or jax.devices()))
    task = assembly.load_task(config)
    stop.check("start-up")
    base = assembly.load_base(config, task)
    stop.check("start-up")
    checkpoints = _checkpoints(config, wanted.identity, base, wanted.workdir, read_only=wanted.read_only)
    wanted.resources.callback(checkpoints.close)
    return task, base, assembly.make_learner(config, base, checkpoints, devices=devices)


def _local_actor(wanted: _Wanted, base: Base, task: Task, *, frozen: Mapping[str, Any] = {}) -> Actor:
    rewards = assembly.make_rewards(wanted.config)
    wanted.resources.callback(rewards.close)
    return assembly.make_actor(wanted.config, base, task, rewards, frozen=frozen)


def _checkpoints(config, identity, base, workdir, *, read_only: bool = False) -> Checkpoints:
    whose = assembly.run_identity(config, identity, base)
    return Checkpoints(workdir / "checkpoints", identity=whose, keep=config.checkpoint.keep, read_only=read_only)


def _records(wanted: _Wanted, path: epath.PathLike) -> RunDirectory:
    directory = RunDirectory(path, tensorboard=wanted.config.metrics.tensorboard and not wanted.read_only)
    wanted.resources.callback(directory.close)
    return directory


def _join_program(distributed: Any) -> None:
    """Joins the other processes of an SPMD program; on a TPU pod they find each other."""
    jax.distributed.initialize(
        coordinator_address=distributed.coordinator or None,
        num_processes=distributed.num_processes or None,
        process_id=distributed.process_id if distributed.process_id >= 0 else None,
    )
    preemption.listen_again()  # `initialize` takes SIGTERM over
