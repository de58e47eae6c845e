"""The configuration of a recorded run, read back from its config.json."""

import json
from typing import Any

from etils import epath
import ml_collections

from configs import base


def read(run: epath.PathLike) -> ml_collections.ConfigDict:
    """Returns the configuration of a run; keys that it did not have yet are at their defaults, keys that are gone are left out.

    Args:
        run: the run directory.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is no configuration.
    """
    path = epath.Path(run) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give the --workdir of a run")
    try:
        values = json.loads(path.read_bytes())
        config = base.get_config()
        for name, value in values.items():
            # null stands for an unset key, and for a number that is not finite: these are defaults.
            if name in base.KEYS and (value is not None or isinstance(base.KEYS[name].default, type)):
                _set(config, name, value)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no configuration ({' '.join(str(error).split())[:200]}): restore it") from error
    return config


def _set(config: ml_collections.ConfigDict, name: str, value: Any) -> None:
    *parents, leaf = name.split(".")
    for parent in parents:
        config = config[parent]
    config[leaf] = tuple(value) if isinstance(value, list) else value
