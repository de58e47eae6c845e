"""Floor 1: the rollouts of one step as one file, readable without pickle.

An uncompressed .npz archive: "records" is a JSON document (UTF-8 bytes as uint8) with one entry for each unit of work, holding the
work (its weight version included), the prompts and the answers' text; entry i's arrays are stored as "i/<field>". The bytes are a
function of the rollouts alone, so that two equal runs write equal files (but for `generation_secs`, which is wall time).
"""

import dataclasses
import io
import json
import zipfile
from typing import Any, Sequence

from etils import epath
import numpy as np

from pgrpo_jax.structs import Prompt, RewardFailure, Rollouts, Work

_ARRAYS = ("prompts", "prompt_lengths", "completions", "completion_lengths", "prompt_index", "behaviour_log_probs", "truncated", "rewards")


def pack_rollouts(rollouts: Sequence[Rollouts]) -> bytes:
    """Returns everything of a step's rollouts as the bytes of one .npz file.

    Args:
        rollouts: the units of work of one step, in canonical order. The facts of their prompts must be JSON (dicts with text keys,
            lists, numbers, text), else they would not be read back equal.

    Returns:
        The file's content; `unpack_rollouts` reads it back to the same records.
    """
    arrays: dict[str, np.ndarray] = {}
    records = []
    for i, unit in enumerate(rollouts):
        records.append({
            "work": dataclasses.asdict(unit.work),
            "prompts": [vars(prompt) | {"facts": dict(prompt.facts)} for prompt in unit.prompt_records],
            "texts": list(unit.texts),
            "reward_failures": [vars(failure) for failure in unit.reward_failures],
            "generation_secs": float(unit.generation_secs),
        })
        arrays |= {f"{i}/{name}": np.asarray(getattr(unit, name)) for name in _ARRAYS}
        arrays |= {f"{i}/reward_components/{name}": np.asarray(values) for name, values in unit.reward_components.items()}
    # ASCII escapes keep lone surrogates, which a tokenizer can emit and UTF-8 can not.
    arrays["records"] = np.frombuffer(json.dumps(records).encode("ascii"), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def find_rollouts(source: epath.PathLike) -> list[epath.Path]:
    """Returns the rollout files of a run directory in the order of their names, or the file itself.

    Raises:
        FileNotFoundError: there is no such source, or no rollouts in it.
    """
    path = epath.Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give the --workdir of a run, or its rollouts/*.npz")
    if not path.is_dir():
        return [path]
    folder = path / "rollouts" if (path / "rollouts").exists() else path
    files = sorted(file for file in folder.iterdir() if file.name.endswith(".npz"))
    if not files:
        raise FileNotFoundError(f"{path} holds no rollouts/*.npz: give the --workdir of a run that has trained a step")
    return files


def load_rollouts(path: epath.PathLike) -> list[Rollouts]:
    """Reads the rollouts of one step back.

    Args:
        path: a file that holds the bytes of `pack_rollouts`.

    Returns:
        The units of work, equal to those written.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or is not a rollouts file.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; rollouts are kept as <workdir>/rollouts/step_NNNNNN.npz")
    return unpack_rollouts(path.read_bytes(), source=str(path))


def unpack_rollouts(content: bytes, *, source: str) -> list[Rollouts]:
    """Reads the bytes of `pack_rollouts` back.

    Args:
        content: the bytes.
        source: where they come from, for people.

    Returns:
        The units of work, equal to those packed.

    Raises:
        ValueError: the bytes are damaged or are no rollouts file.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        records = json.loads(arrays["records"].tobytes().decode("ascii"))
        return [_unit(i, record, arrays) for i, record in enumerate(records)]
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError, TypeError, AttributeError) as error:
        raise ValueError(f"{source} is damaged or no rollouts file ({type(error).__name__}: {error}); restore it or delete it") from error


def _unit(i: int, record: dict[str, Any], arrays: dict[str, np.ndarray]) -> Rollouts:
    prefix = f"{i}/reward_components/"
    return Rollouts(
        work=Work(**record["work"] | {"failed_rewards": _failures(record["work"]["failed_rewards"])}),
        prompt_records=tuple(Prompt(**prompt) for prompt in record["prompts"]),
        texts=tuple(record["texts"]),
        reward_failures=_failures(record["reward_failures"]),
        generation_secs=record["generation_secs"],
        reward_components={name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)},
        **{name: arrays[f"{i}/{name}"] for name in _ARRAYS},
    )


def _failures(records: list[dict[str, Any]]) -> tuple[RewardFailure, ...]:
    return tuple(RewardFailure(**record) for record in records)
