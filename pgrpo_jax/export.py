"""Floor 5: export: the policy of a run's newest checkpoint as a Hugging Face directory, which transformers loads, and `model.path` takes again."""

import dataclasses
import os
import pathlib
import shutil
import tempfile
from typing import Any, Mapping

import jax
import numpy as np
from etils import epath

from pgrpo_jax import assembly, policies, settings
from pgrpo_jax.models import hugging_face_files, lora, safetensors_weights, weights
from pgrpo_jax.preemption import EXIT_PREEMPTED, Preempted, Stop


def export(config: Any, *, identity: Mapping[str, Any], workdir: epath.PathLike, output: str, dtype: str = "float32", preference_group: str = "", stop: Stop) -> int:
    """Writes the policy of the newest committed checkpoint; the run, which may still be training, is only read.

    The directory appears whole or not at all: it is written beside its place, and renamed.

    Args:
        config: the run's, every key of configs/base.py.
        identity: its identity keys, flat.
        workdir: the run directory.
        output: the directory to make.
        dtype: of the tensors, one of `safetensors_weights.DTYPES`; float32 are the bits of the checkpoint.
        preference_group: number or name of the one whose adapter is merged into the model, where each has its own; "" = one policy answers all.
        stop: set by SIGTERM or SIGINT.

    Returns:
        The exit status: 0, or 75 when stopped before the end, with nothing written.

    Raises:
        ValueError: the configuration, the checkpoint or the model can not be used, or a parameter does not fit `dtype`.
        FileNotFoundError: there is no committed checkpoint.
        FileExistsError: the output is there already.
        OSError: nothing can be written there.
    """
    target = _checked(output)
    settings.check(config)
    try:
        task = assembly.load_task(config)
        preference_id = policies.find_preference_group(task, preference_group)
        adapter = policies.adapter_of(config, task, preference_id)
        saved = policies.restore(config, identity=identity, run=workdir, task=task)
        stop.check("export")
        params = merged(saved, adapter)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.partial-", dir=target.parent) as beside:
            made = pathlib.Path(beside) / target.name
            made.mkdir()
            write(made, saved, params, dtype=dtype)
            _sync(made)
            stop.check("export")
            made.rename(target)  # the kernel refuses it if another program has filled the place meanwhile
            _sync(target.parent, content=False)
    except Preempted as reason:
        print(f"{reason}: nothing is written; run the same command again")
        return EXIT_PREEMPTED
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"step {saved.learner.step} of {workdir}: {count:,} parameters in {dtype} are in {target}")
    return 0


def merged(saved: policies.Saved, adapter: int) -> Any:
    """Returns the policy on the host as a model without adapters, in the tree of `parameter_shapes`.

    Args:
        saved: whose policy it is.
        adapter: which of its adapters is merged into the model, where it has some.
    """
    adapters, params = saved.base.model.config.lora, jax.device_get(policies.policy_of(saved.learner))
    if adapters is None:
        return params
    exact = jax.tree.map(lambda x: np.asarray(x, np.float32), params)  # a frozen model may be held in half precision
    return lora.merged(adapters, exact, adapter)


def write(directory: pathlib.Path, saved: policies.Saved, params: Any, *, dtype: str) -> None:
    """Writes all files of a model into a directory that is there already.

    Args:
        directory: empty.
        saved: whose policy it is.
        params: on the host, in the tree of `parameter_shapes`.
        dtype: of the tensors.

    Raises:
        ValueError: no architecture describes the model, or a parameter does not fit `dtype`.
    """
    config, model, tokenizer = saved.config, dataclasses.replace(saved.base.model.config, lora=None), saved.base.tokenizer
    source = weights.locate(config.model.path) if config.model.path else None
    if source is not None and source.is_dir():
        hugging_face_files.copy(source, directory, dtype=dtype)
    else:
        hugging_face_files.write(directory, model, tokenizer, dtype=dtype)
    support = settings.generation_settings(config, tokenizer).support
    hugging_face_files.write_generation_config(
        directory, tokenizer, temperature=support.temperature, top_k=support.top_k, top_p=support.top_p
    )
    safetensors_weights.save(directory, model, params, dtype=dtype)
    for file in directory.glob("*.safetensors"):  # the library makes them for the owner's eyes only
        shutil.copymode(directory / "config.json", file)


def _checked(output: str) -> pathlib.Path:
    """The place of the directory, absolute; whatever speaks against it is said before any work."""
    if not output:
        raise ValueError("--output is empty: give a directory to make")
    if "://" in output:
        raise ValueError(f"--output {output} is in a bucket: give a local directory, and copy it there")
    target = pathlib.Path(output).absolute()
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise FileExistsError(f"--output {output} is there already: give a new directory, or delete it")
    existing = next(path for path in target.parents if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"--output {output}: nothing can be made in {existing}: give another place")
    return target


def _sync(directory: pathlib.Path, *, content: bool = True) -> None:
    """Makes a directory's names durable, and the files' contents, so that it is whole even if the machine stops right after."""
    for path in [*(directory.iterdir() if content else ()), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
