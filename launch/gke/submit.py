"""Runs on GKE: fills in one of the manifests beside this file and hands it to kubectl, or makes the node pools that it needs.

    python launch/gke/submit.py WHAT --name=NAME [--option=value ...] [--dry-run] [-- --config.key=value ...]

WHAT is rayjob (a run with the ray engine), raycluster (the same cluster, standing), jobset (a run as one SPMD program without Ray), kueue
(the queue they name) or node-pools (spot node pools for their TPU slices). What follows `--` goes to launch/train.py. --dry-run prints the
manifest or the commands and runs nothing. Needs kubectl, or gcloud, logged in; nothing else but Python.
"""

import argparse
import json
import math
import pathlib
import re
import shlex
import string
import subprocess
import sys
import textwrap
from typing import NamedTuple, Sequence

_HERE = pathlib.Path(__file__).resolve().parent
_APP = pathlib.PurePosixPath("/app")  # where the Dockerfile puts the repository
_MANIFESTS = ("rayjob", "raycluster", "jobset", "kueue")
# `ray job submit` joins the arguments by the rules of another system's shell, so that only these survive it.
_SAFE = re.compile(r"[\w@%+=:,./ -]*", re.ASCII)


class Generation(NamedTuple):
    """A TPU generation: its names on nodes (GKE), of machines (with {} chips a host) and in Ray, and the dimensions of a topology."""

    accelerator: str
    machine: str
    ray: str
    dimensions: int


GENERATIONS = {
    "v4": Generation("tpu-v4-podslice", "ct4p-hightpu-{}t", "v4", 3),
    "v5e": Generation("tpu-v5-lite-podslice", "ct5lp-hightpu-{}t", "v5litepod", 2),
    "v5p": Generation("tpu-v5p-slice", "ct5p-hightpu-{}t", "v5p", 3),
    "v6e": Generation("tpu-v6e-slice", "ct6e-standard-{}t", "v6e", 2),
}


class Slice(NamedTuple):
    """A TPU slice: its topology, and how many chips and hosts that makes."""

    topology: str
    chips: int
    chips_per_host: int
    hosts: int


def slice_of(generation: str, topology: str) -> Slice:
    """Returns the slice of a topology.

    Args:
        generation: a key of GENERATIONS.
        topology: chips along each dimension, for example "4x4".

    Raises:
        ValueError: the topology does not belong to the generation, or fills no host.
    """
    dimensions = GENERATIONS[generation].dimensions
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", topology) or topology.count("x") != dimensions - 1:
        example = "x".join("4" * dimensions)
        raise ValueError(f"topology {topology!r} has not the {dimensions} dimensions of a {generation}: write, for example, {example}")
    chips = math.prod(map(int, topology.split("x")))
    if chips % 4:
        raise ValueError(f"topology {topology} has {chips} chips, not a multiple of the 4 of one host: give a larger one")
    chips_per_host = 8 if (chips, dimensions) == (8, 2) else 4  # eight chips in a plane share one host
    return Slice(topology, chips, chips_per_host, chips // chips_per_host)


def train_flags(options: argparse.Namespace, learner: Slice, actor: Slice) -> list[str]:
    """Returns the flags of launch/train.py: those that follow from where it runs first, so that the caller's own win."""
    flags = [f"--config={_APP / options.config}", f"--workdir={options.workdir}"]
    if options.what == "rayjob":
        ray = GENERATIONS[options.generation].ray
        flags += ["--config.engine=ray", "--config.ray.address=auto", f"--config.num_actors={options.num_actors}"]
        flags += [f"--config.learner.num_processes={learner.hosts}"]
        flags += [f"--config.ray.learner_slice={ray}:{learner.topology}", f"--config.ray.actor_slice={ray}:{actor.topology}"]
    else:
        flags += ["--config.engine=inline", "--config.distributed.enabled=True"]
    return flags + options.flags


def entrypoint(flags: Sequence[str]) -> str:
    """Returns the command of a RayJob, as one line.

    Raises:
        ValueError: an argument would not reach the program as it is.
    """
    for flag in flags:
        if not _SAFE.fullmatch(flag):
            raise ValueError(f"argument {flag!r} holds a character that `ray job submit` does not pass on: put it into a file of configs/")
    relaunch, train = str(_APP / "launch/relaunch.sh"), str(_APP / "launch/train.py")
    return shlex.join(["bash", relaunch, "--retries=5", "--wait=30", "python", train, *flags])


def manifest(options: argparse.Namespace) -> str:
    """Returns the manifest, filled in.

    Raises:
        ValueError: a value is missing or out of bounds.
    """
    learner, actor = slice_of(options.generation, options.topology), slice_of(options.generation, options.actor_topology)
    values = {
        "name": options.name,
        "namespace": options.namespace,
        "image": options.image,
        "queue": options.queue,
        "queue_hosts": f"{options.queue}-hosts",
        "ray_version": options.ray_version,
        "accelerator": GENERATIONS[options.generation].accelerator,
        "num_actors": options.num_actors,
        "chips": learner.chips + options.num_actors * actor.chips,
    }
    for role, shape in (("learner", learner), ("actor", actor)):
        values |= {f"{role}_{name}": value for name, value in shape._asdict().items()}
    if options.what in ("rayjob", "jobset"):
        flags = train_flags(options, learner, actor)
        values["entrypoint"] = entrypoint(flags) if options.what == "rayjob" else ""
        values["command"] = ["python", str(_APP / "launch/train.py"), *flags]
    quoted = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}  # JSON is YAML: any value stays what it is
    spec = _template("raycluster").partition("\nspec:\n")[2]
    quoted["cluster"] = textwrap.indent(string.Template(spec).substitute(quoted), "  ").rstrip("\n")
    return string.Template(_template(options.what)).substitute(quoted)


def _template(what: str) -> str:
    return (_HERE / f"{what}.yaml").read_text()


def node_pools(options: argparse.Namespace) -> list[list[str]]:
    """Returns the commands that make the spot node pools of a run: scaled from zero, a slice of several hosts as a whole."""
    learner, actor = slice_of(options.generation, options.topology), slice_of(options.generation, options.actor_topology)
    pools = [("learner", learner, learner.hosts)]
    if actor.hosts == 1:  # slices of one host may share a pool
        pools += [("actors", actor, options.num_actors)] if options.num_actors else []
    else:
        pools += [(f"actor-{i}", actor, actor.hosts) for i in range(options.num_actors)]
    commands = []
    for role, shape, nodes in pools:
        command = ["gcloud", "container", "node-pools", "create", f"{options.name}-{role}"]
        command += [f"--cluster={options.cluster}", f"--location={options.location}", f"--node-locations={options.zone}", "--spot"]
        command += [f"--machine-type={GENERATIONS[options.generation].machine.format(shape.chips_per_host)}"]
        command += [f"--tpu-topology={shape.topology}"] if shape.hosts > 1 else []
        command += ["--num-nodes=0", "--enable-autoscaling", "--min-nodes=0", f"--max-nodes={nodes}"]
        commands.append(command + ([f"--project={options.project}"] if options.project else []))
    return commands


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses the command line; what is wrong with it is an error of argparse's kind, exit status 2."""
    own, flags = list(arguments), []
    if "--" in own:
        own, flags = own[: own.index("--")], own[own.index("--") + 1 :]
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="submit.py", description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("what", choices=(*_MANIFESTS, "node-pools"))
    parser.add_argument("--name", required=True, help="of the run: lower-case letters, digits and -, at most 30")
    parser.add_argument("--namespace", default="default", help="of Kubernetes")
    parser.add_argument("--image", default="", help="made by launch/gke/Dockerfile")
    parser.add_argument("--generation", choices=tuple(GENERATIONS), default="v5e", help="of the TPU")
    parser.add_argument("--topology", default="4x4", help="of the learner's slice")
    parser.add_argument("--actor-topology", default="2x2", help="of each actor's slice")
    parser.add_argument("--num-actors", type=int, default=4)
    parser.add_argument("--config", default="", help="a file of this repository: configs/NAME.py")
    parser.add_argument("--workdir", default="", help="gs://BUCKET/RUN")
    parser.add_argument("--queue", default="pgrpo", help="of Kueue")
    parser.add_argument("--ray-version", default="2.60.0", help="of the image")
    parser.add_argument("--cluster", default="", help="of GKE, for node-pools")
    parser.add_argument("--location", default="", help="of that cluster, for node-pools")
    parser.add_argument("--zone", default="", help="of the nodes, for node-pools")
    parser.add_argument("--project", default="", help="gcloud's own unless given")
    parser.add_argument("--dry-run", action="store_true", help="print, run nothing")
    options = parser.parse_args(own, argparse.Namespace(flags=flags))
    if problem := _problem(options):
        parser.error(problem)
    return options


def _problem(options: argparse.Namespace) -> str:
    needed = {"rayjob": ("image", "config", "workdir"), "jobset": ("image", "config", "workdir"), "raycluster": ("image",)}
    needed["node-pools"] = ("cluster", "location", "zone")
    missing = [f"--{name}" for name in needed.get(options.what, ()) if not getattr(options, name)]
    if missing:
        return f"{options.what} needs {', '.join(missing)}"
    for option in ("name", "namespace", "queue"):
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,28}[a-z0-9])?", getattr(options, option)):
            return f"--{option}={getattr(options, option)} is no name: lower-case letters, digits and -, at most 30"
    if options.workdir and not options.workdir.startswith("gs://"):
        return f"--workdir={options.workdir} is not in a bucket: pods take their disks along, give gs://BUCKET/RUN"
    if options.num_actors < 0:
        return f"--num-actors={options.num_actors} is below 0"
    if strange := [flag for flag in options.flags if not flag.startswith("--config.")]:
        return f"{strange[0]} is not --config.key=value"
    return ""


def main(arguments: Sequence[str]) -> int:
    """Prints or runs what was asked for; returns the exit status."""
    options = parse(arguments)
    try:
        commands = node_pools(options) if options.what == "node-pools" else [["kubectl", "apply", "--filename", "-"]]
        text = "" if options.what == "node-pools" else manifest(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for command in commands:
        if options.dry_run:
            print(("# " if text else "") + shlex.join(command))  # a manifest stays one, with the command as its comment
        elif code := subprocess.run(command, input=text or None, text=True, check=False).returncode:
            return code
    if options.dry_run and text:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
