"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685): beside a frozen matrix W, an update of rank r that is trained in its place.

    y = x·W + (alpha / r) · (x·A_k)·B_k

One model carries K adapters (one, or one for each preference group); which one a sequence uses is named by row. The products with all K are one
matmul, and of its result only the row's own part goes on: K·r columns are few, nothing is gathered, and an adapter that no row uses has a gradient of
exactly 0. Adapters are parameters like others, named after their matrix: `query_lora_a`, `query_lora_b`.
"""

import dataclasses
import math
from typing import Any, Mapping, Sequence
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np

# The matrices that may have adapters -> how many of their leading axes (without that of layers) are inputs.
TARGETS = {"query": 1, "key": 1, "value": 1, "output": 2, "gate": 1, "up": 1, "down": 1}
A, B = "_lora_a", "_lora_b"  # how the parameters of an adapter end


@dataclasses.dataclass(frozen=True)
class Lora:
    """The adapters of a model.

    Attributes:
        rank: r, at least 1.
        alpha: what an adapter adds is multiplied by alpha / r.
        targets: the matrices that have one, of `TARGETS`.
        num_adapters: K; of one, rows need not say which.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    num_adapters: int = 1

    def __post_init__(self):
        if self.rank < 1 or self.num_adapters < 1:
            raise ValueError(f"lora has rank {self.rank} and {self.num_adapters} adapters, both must be at least 1: leave adapters out to train the model itself")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"lora's alpha is {self.alpha}, must be finite and above 0: twice the rank is usual")
        unknown = sorted(set(self.targets) - set(TARGETS))
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"lora's targets are {' '.join(self.targets)!r}, must be some of {' '.join(TARGETS)}, each once")


def is_adapter(name: str) -> bool:
    """Returns whether a parameter is a part of an adapter, by its name."""
    return name.endswith((A, B))


def names(target: str) -> tuple[str, str]:
    """Returns the names of a matrix's A and B."""
    return target + A, target + B


def shapes(lora: Lora, matrices: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of adapters, without the axis of layers.

    Args:
        lora: rank, targets and their number.
        matrices: name -> shape, without the axis of layers.

    Returns:
        Name -> shape: A [K, inputs..., r], B [K, r, outputs...].
    """
    found = {}
    for target in lora.targets:
        (a, b), split, shape = names(target), TARGETS[target], matrices[target]
        found |= {a: (lora.num_adapters, *shape[:split], lora.rank), b: (lora.num_adapters, lora.rank, *shape[split:])}
    return found


def cuts(table: Mapping[str, tuple[str | None, ...]]) -> dict[str, tuple[str | None, ...]]:
    """Returns where adapters are cut, in the form of `parameters.SHARDED_AXES`: A as its matrix's inputs, B as its outputs."""
    found = {}
    for target, split in TARGETS.items():
        (a, b), (layers, *axes) = names(target), table[target]
        found |= {a: (layers, None, *axes[:split], None), b: (layers, None, None, *axes[split:])}
    return found


def added(lora: Lora | None, weights: Mapping[str, Any], target: str, x: chex.Array, y: chex.Array, adapters: chex.Array | None) -> chex.Array:
    """Returns x·W, given as y, with what the adapters of W add to it.

    Args:
        lora: None = there are none.
        weights: of one layer; A and B in any float dtype.
        target: W's name.
        x: [B, T, inputs], the inputs as one axis.
        y: [B, T, outputs...].
        adapters: [B] int32 in [0, K), of each row; not read where K is 1.

    Raises:
        ValueError: the model has several adapters and no row says which.
    """
    if lora is None or target not in lora.targets:
        return y
    a, b = (weights[name].astype(x.dtype) for name in names(target))
    few = jnp.einsum("bti,kir->btkr", x, a.reshape(lora.num_adapters, -1, lora.rank)) * jnp.asarray(lora.alpha / lora.rank, x.dtype)
    if lora.num_adapters > 1:
        if adapters is None:
            raise ValueError(f"the model has {lora.num_adapters} adapters, one must be named for each row: pass `adapters`, preference ids [B]")
        own = adapters[:, None] == jnp.arange(lora.num_adapters, dtype=adapters.dtype)[None, :]
        few = jnp.where(own[:, None, :, None], few, jnp.zeros_like(few))
    return y + jnp.tensordot(few, b, 2)


def of_rows(lora: Lora | None, preference_ids: Sequence[int]) -> np.ndarray:
    """Returns the adapter of each row [B] int32: that of its preference group where the model has several, else the first."""
    several = lora is not None and lora.num_adapters > 1
    return np.asarray(preference_ids, np.int32) if several else np.zeros(len(preference_ids), np.int32)


def initial(lora: Lora, shapes_of: Mapping[str, Any], key: chex.PRNGKey) -> dict[str, Any]:
    """Draws adapters that change nothing: A normal with variance 1 / inputs, B 0.

    All K begin alike, so that what comes to distinguish them are their prompts and rewards alone.

    Args:
        lora: rank, targets and their number.
        shapes_of: of `trainable(parameter_shapes(…))`: {"layers": name -> shape [L, K, ...]}.
        key: names the random stream.

    Returns:
        {"layers": name -> float32 NumPy array}.
    """

    def draw(name: str, shape: Sequence[int]) -> np.ndarray:
        if name.endswith(B):
            return np.zeros(shape, np.float32)
        one = jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), (shape[0], 1, *shape[2:]), jnp.float32)
        return np.broadcast_to(np.asarray(one) / math.sqrt(math.prod(shape[2:-1])), shape)

    return {"layers": {name: draw(name, spec.shape) for name, spec in shapes_of["layers"].items()}}


def trainable(lora: Lora | None, params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is trained of a parameter tree: the adapters, or without them all of it."""
    return dict(params) if lora is None else {"layers": {name: leaf for name, leaf in params["layers"].items() if is_adapter(name)}}


def joined(frozen: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the whole parameter tree of what is trained and what is not; {} = everything is trained."""
    return {**frozen, **trained, "layers": {**frozen.get("layers", {}), **trained["layers"]}}


def merged(lora: Lora, params: Mapping[str, Any], adapter: int = 0) -> dict[str, Any]:
    """Returns the parameter tree of a model without adapters that computes what this one does with one of them.

    Args:
        lora: rank, targets and their number.
        params: the whole tree, on the host or on devices.
        adapter: which of the K.

    Raises:
        ValueError: there is no such adapter.
    """
    if not 0 <= adapter < lora.num_adapters:
        raise ValueError(f"adapter {adapter} is outside [0, {lora.num_adapters}): name one of the model's adapters")
    layers = {name: leaf for name, leaf in params["layers"].items() if not is_adapter(name)}
    for target in lora.targets:
        a, b = (params["layers"][name][:, adapter] for name in names(target))
        matrix, numpy = layers[target], np if isinstance(layers[target], np.ndarray) else jnp
        change = numpy.einsum("lir,lro->lio", a.reshape(len(a), -1, lora.rank), b.reshape(len(b), lora.rank, -1)) * np.float32(lora.alpha / lora.rank)
        layers[target] = (matrix + change.reshape(matrix.shape)).astype(matrix.dtype)
    return {**params, "layers": layers}
