"""Every key is documented and used, every configuration starts from base.py and says how it is run."""

import ast
import importlib
import pathlib
import re
import shlex

import ml_collections
import pytest

from configs import base
from pgrpo_jax import algorithm_settings, placement, settings

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "base", "laboratory"))


def leaves(config, prefix=""):
    for key in config:
        value = config.get_ref(key).get() if isinstance(config, ml_collections.ConfigDict) else config[key]
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, ml_collections.ConfigDict) else [f"{prefix}{key}"]


def load(path):
    return importlib.import_module(f"configs.{path.stem}").get_config()


def test_the_keys_are_the_configuration():
    assert sorted(leaves(base.get_config())) == sorted(base.KEYS)
    for name, key in base.KEYS.items():
        assert key.kind in ("identity", "free") and len(key.doc.split()) >= 1, name


def test_identity_is_what_decides_the_trajectory():
    identity = base.identity(base.get_config())
    assert set(identity) == {name for name, key in base.KEYS.items() if key.kind == "identity"}
    assert {"seed", "num_steps", "prompts_per_work", "staleness.reload", "staleness.lag", "optimiser.learning_rate"} <= set(identity)
    for free in ("engine", "task.data_dir", "model.path", "checkpoint.save_every", "metrics.tensorboard", "evaluation.num_prompts"):
        assert free not in identity
    assert identity["generation.prompt_buckets"] == [64, 128, 256, 512, 1024]  # as JSON reads it back
    assert identity["algorithm.clip_low"] is None


def test_two_configurations_share_nothing():
    first, second = base.get_config(), base.get_config()
    first.staleness.lag, first.algorithm.clip_low, first.task.num_preference_groups = 3, 0.5, 9
    assert (second.staleness.lag, second.algorithm.clip_low, second.task.num_preference_groups) == (None, None, 5)
    assert base.get_config().staleness.lag is None


def test_an_unset_key_takes_only_its_type():
    config = base.get_config()
    with pytest.raises(TypeError):
        config.staleness.lag = "one"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_loads_is_locked_and_may_run(path):
    config = load(path)
    assert sorted(leaves(config)) == sorted(base.KEYS) and config.is_locked
    settings.check(config)
    placement.check_devices(config, num_devices=1)
    with pytest.raises(AttributeError):
        config.nope = 1
    with pytest.raises(AttributeError):
        config.optimiser.learning_rat = 1e-3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_defaults_live_only_in_base(path):
    """What a configuration does not name is as base.py says; it names nothing twice."""
    default, config = base.get_config(), load(path)
    body = next(node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)).body
    assigned = [ast.unparse(node.targets[0]).removeprefix("config.") for node in body if isinstance(node, ast.Assign)][1:]
    assert len(assigned) == len(set(assigned)) > 0
    for name in set(base.KEYS) - set(assigned):
        assert algorithm_settings.value_of(config, name) == algorithm_settings.value_of(default, name), name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_head_holds_a_command_that_runs_this_file(path):
    commands = [line.strip() for line in ast.get_docstring(ast.parse(path.read_text())).splitlines() if line.strip().startswith("python ")]
    assert commands
    for command in commands:
        words = shlex.split(re.sub(r"\s{2,}\(.*\)$", "", command))
        assert (ROOT / words[1]).is_file() and f"--config=configs/{path.name}" in words
        assert any(re.fullmatch(r"--workdir=\S+", word) for word in words)
        keys = [match[1] for word in words if (match := re.match(r"--config\.([^=]+)=", word))]
        assert set(keys) <= set(base.KEYS)
