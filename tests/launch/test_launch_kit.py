"""What the launch kit has in common: its commands fit the program, its scripts parse, Ray's own schema takes the cluster file."""

import json
import os
import pathlib
import re
import shlex
import subprocess

import jsonschema
import pytest
import ray.autoscaler
import yaml
from absl import flags
from ml_collections import config_flags

from configs import base
from launch.gke import submit

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
RUNNING = ROOT / "docs" / "running.md"
FILES = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.yaml"), *(LAUNCH / "gke").iterdir(), RUNNING])
GKE = ["--name=run-1", "--image=i", "--config=configs/smoke.py", "--workdir=gs://bucket/run"]


def keys(text):
    """Every configuration key that a text names as a flag, without the examples "key" and "…"."""
    return {match.rstrip(".") for match in re.findall(r"--(?:no)?config\.([A-Za-z_][\w.]*)", text)} - {"key"}


def parsed(arguments):
    """(configuration, run directory) after the program has read a command line: unknown keys and values of another type are errors."""
    (file,) = [argument for argument in arguments if argument.startswith("--config=")]
    assert (ROOT / file.partition("=")[2].removeprefix("/app/")).is_file()
    line = ["train.py", *(argument for argument in arguments if argument != file)]
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_dict("config", base.get_config(), flag_values=values, sys_argv=line)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    assert values(line)[1:] == []
    return values[config.name].value, values["workdir"].value


@pytest.mark.parametrize("path", [path for path in FILES if path.is_file()], ids=lambda path: path.name)
def test_every_flag_is_a_key(path):
    unknown = keys(path.read_text()) - set(base.KEYS)
    assert not unknown, f"{path.relative_to(ROOT)} names {sorted(unknown)}: configs/base.py has no such key"


def test_the_kit_names_keys_at_all():
    assert keys((LAUNCH / "tpu_pod.sh").read_text()) == {"distributed.enabled"}
    assert {"engine", "num_actors", "ray.address", "ray.learner_slice"} <= keys((LAUNCH / "gke" / "submit.py").read_text())
    assert {"engine", "num_actors", "staleness.reload", "checkpoint.must_save_by"} <= keys(RUNNING.read_text())


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse(path):
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=60)


def test_the_flags_of_a_rayjob_are_read_by_the_program():
    options = submit.parse(["rayjob", *GKE, "--num-actors=3", "--generation=v6e", "--topology=4x8", "--", "--config.staleness.reload=4"])
    learner, actor = submit.slice_of("v6e", "4x8"), submit.slice_of("v6e", "2x2")
    config, workdir = parsed(submit.train_flags(options, learner, actor))
    assert (config.engine, config.num_actors, config.ray.address, config.learner.num_processes) == ("ray", 3, "auto", 8)
    assert (config.ray.learner_slice, config.ray.actor_slice, config.staleness.reload) == ("v6e:4x8", "v6e:2x2", 4)
    assert workdir == "gs://bucket/run"


def test_the_flags_of_a_jobset_are_read_by_the_program():
    options = submit.parse(["jobset", *GKE])
    shape = submit.slice_of("v5e", "4x4")
    config, _ = parsed(submit.train_flags(options, shape, shape))
    assert (config.engine, config.distributed.enabled) == ("inline", True)


@pytest.fixture(scope="module")
def cluster():
    return yaml.safe_load((LAUNCH / "ray_cluster.yaml").read_text())


def test_rays_own_schema_takes_the_cluster_file(cluster):
    schema = json.loads((pathlib.Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster | {"max_worker": 1}, schema)


def test_the_cluster_has_room_for_its_nodes(cluster):
    types = cluster["available_node_types"]
    workers = {name: kind for name, kind in types.items() if name != cluster["head_node_type"]}
    assert sum(kind["max_workers"] for kind in workers.values()) <= cluster["max_workers"]
    assert all(0 <= kind["min_workers"] <= kind["max_workers"] for kind in workers.values())


def test_actors_are_preemptible_and_the_head_is_not(cluster):
    types = dict(cluster["available_node_types"])
    head = types.pop(cluster["head_node_type"])
    assert "scheduling" not in head["node_config"] and head["resources"] == {"CPU": 0}
    for kind in types.values():
        config = kind["node_config"]
        if "acceleratorType" in config:
            assert config["schedulingConfig"] == {"spot": True}
            assert kind["resources"]["TPU"] == int(config["acceleratorType"].rpartition("-")[2])
        else:
            assert config["scheduling"]["provisioningModel"] == "SPOT"


def test_the_cluster_asks_for_a_token_and_shows_no_dashboard(cluster):
    starts = [line for key in ("head_start_ray_commands", "worker_start_ray_commands") for line in cluster[key] if "ray start" in line]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "--include-dashboard=False" in starts[0] and not any("0.0.0.0" in line for line in starts)
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_the_command_in_the_head_of_the_cluster_file_is_one_that_runs(cluster):
    """Its flags are read, and the resources it asks for are those of a node type."""
    text = re.sub(r"\n#\s*", " ", (LAUNCH / "ray_cluster.yaml").read_text())
    command = shlex.split(re.search(r"'(cd ~/pgrpo_jax && [^']*)'", text)[1])
    start = command.index("launch/train.py")
    assert command[:6] == ["cd", "~/pgrpo_jax", "&&", "bash", "launch/relaunch.sh", "--retries=5"]
    config, _ = parsed(command[start + 1 :])
    types = cluster["available_node_types"]
    for asked in (config.ray.learner_resources, config.ray.actor_resources):
        name, number = asked.split("=")
        assert int(number) in [kind["resources"].get(name) for kind in types.values()]
    assert config.num_actors == types["tpu_actor"]["max_workers"]


def test_commands_in_the_documentation_name_files_that_are_there():
    named = set(re.findall(r"(?<!\w/)(?<!\w)((?:launch|configs)/[\w./-]+\w)", RUNNING.read_text()))
    missing = [name for name in named if not (ROOT / name).exists() and not name.endswith("NAME.py")]
    assert named and not missing, missing
    assert os.access(LAUNCH / "relaunch.sh", os.X_OK)
