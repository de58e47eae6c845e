"""Model families as data: the sizes of a model, its parameter tree, and where a model file keeps each parameter.

A family is one table (`Family`): which metadata key holds which size, and which tensor of the file becomes which parameter.
Adding a family means adding a table; the loader (weights.py) and the network (transformer.py) read it and stay as they are.
"""

import dataclasses
import functools
import math
import operator
from typing import Any, Mapping, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_SIZE_LIMIT = 2**31  # sizes index int32 arrays


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The sizes of a decoder-only transformer with RMSNorm, gated MLP and rotate-half RoPE.

    Attributes:
        num_layers: L.
        width: D, the residual stream.
        mlp_width: F, the hidden layer of the MLP.
        num_heads: H, query heads.
        num_kv_heads: Hkv, key and value heads; divides H.
        head_dim: Dh; even, because RoPE rotates pairs.
        vocab_size: V.
        context_length: tokens the model was trained to attend over.
        rope_theta: base of the RoPE wavelengths.
        norm_epsilon: added to the mean square inside RMSNorm.
        tied_embeddings: True where the embedding is also the output head.
    """

    num_layers: int
    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    rope_theta: float
    norm_epsilon: float
    tied_embeddings: bool

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or not 1 <= value < _SIZE_LIMIT):
                raise ValueError(f"{field.name} is {value!r}, must be a whole number in [1, {_SIZE_LIMIT}): correct the model's sizes")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}, must be a multiple of num_kv_heads {self.num_kv_heads}: each key/value head serves "
                "the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, must be even: RoPE rotates pairs of channels")
        if not (math.isfinite(self.rope_theta) and self.rope_theta > 0):
            raise ValueError(f"rope_theta is {self.rope_theta}, must be finite and above 0: 10000 is the usual value")
        if not 0 < self.norm_epsilon < 1:
            raise ValueError(f"norm_epsilon is {self.norm_epsilon}, must be in (0, 1): 1e-5 is the usual value")
        if type(self.tied_embeddings) is not bool:
            raise ValueError(f"tied_embeddings is {self.tied_embeddings!r}, must be True or False")


class TensorRule(NamedTuple):
    """How one tensor of a model file becomes one parameter (or, with "{layer}" in its name, one row of a stacked parameter).

    Attributes:
        source: the tensor's name in the file.
        path: the parameter's place in the tree of `parameter_shapes`.
        input_axes: 0 where the file holds the parameter as it is; otherwise the file holds a matrix [outputs, inputs], and
            this is how many leading axes of the parameter (without the layer axis) are inputs.
        interleaved: True where the rows of each head are ordered for RoPE over neighbouring pairs (0, 1), (2, 3), ...;
            the transformer rotates halves, (0, Dh/2), (1, Dh/2 + 1), ....
    """

    source: str
    path: tuple[str, ...]
    input_axes: int = 0
    interleaved: bool = False


class Family(NamedTuple):
    """One architecture of model files.

    Attributes:
        name: its `general.architecture`, also the prefix of its metadata keys.
        metadata: field of `ModelConfig` -> metadata key, without the prefix.
        tensors: one rule for each parameter.
        unsupported: metadata keys that change the network in a way the transformer does not compute -> the value that
            switches them off; a file with any other value is refused rather than computed wrongly.
    """

    name: str
    metadata: Mapping[str, str]
    tensors: tuple[TensorRule, ...]
    unsupported: Mapping[str, Any]


LLAMA = Family(
    name="llama",
    metadata={
        "num_layers": "block_count",
        "width": "embedding_length",
        "mlp_width": "feed_forward_length",
        "num_heads": "attention.head_count",
        "num_kv_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "vocab_size": "vocab_size",
        "context_length": "context_length",
        "rope_theta": "rope.freq_base",
        "norm_epsilon": "attention.layer_norm_rms_epsilon",
    },
    tensors=(
        TensorRule("token_embd.weight", ("embedding",)),
        TensorRule("output_norm.weight", ("final_norm",)),
        TensorRule("output.weight", ("head",), input_axes=1),
        TensorRule("blk.{layer}.attn_norm.weight", ("layers", "attention_norm")),
        TensorRule("blk.{layer}.attn_q.weight", ("layers", "query"), input_axes=1, interleaved=True),
        TensorRule("blk.{layer}.attn_k.weight", ("layers", "key"), input_axes=1, interleaved=True),
        TensorRule("blk.{layer}.attn_v.weight", ("layers", "value"), input_axes=1),
        TensorRule("blk.{layer}.attn_output.weight", ("layers", "output"), input_axes=2),
        TensorRule("blk.{layer}.ffn_norm.weight", ("layers", "mlp_norm")),
        TensorRule("blk.{layer}.ffn_gate.weight", ("layers", "gate"), input_axes=1),
        TensorRule("blk.{layer}.ffn_up.weight", ("layers", "up"), input_axes=1),
        TensorRule("blk.{layer}.ffn_down.weight", ("layers", "down"), input_axes=1),
    ),
    unsupported={"rope.scaling.type": "none", "rope.scale_linear": 1.0, "expert_count": 0, "attention.sliding_window": 0},
)

FAMILIES = {"llama": LLAMA}


def family(architecture: Any) -> Family:
    """Returns the family of an architecture's name.

    Args:
        architecture: a model file's `general.architecture`.

    Returns:
        Its table.

    Raises:
        ValueError: the architecture is not known.
    """
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise ValueError(f"architecture is {architecture!r}, known are {', '.join(sorted(FAMILIES))}: choose a model of a known family")
    return FAMILIES[architecture]


def parameter_shapes(config: ModelConfig) -> dict[str, Any]:
    """Returns the parameter tree of a model as shapes.

    Args:
        config: the model's sizes.

    Returns:
        A tree of float32 `jax.ShapeDtypeStruct`: embedding [V, D], final_norm [D], head [D, V] where the embeddings are not
        tied, and under "layers", stacked over L: attention_norm [L, D], query [L, D, H, Dh], key and value [L, D, Hkv, Dh],
        output [L, H, Dh, D], mlp_norm [L, D], gate and up [L, D, F], down [L, F, D].
    """
    width, heads, kv_heads, head_dim = config.width, config.num_heads, config.num_kv_heads, config.head_dim
    layers = {
        "attention_norm": (width,),
        "query": (width, heads, head_dim),
        "key": (width, kv_heads, head_dim),
        "value": (width, kv_heads, head_dim),
        "output": (heads, head_dim, width),
        "mlp_norm": (width,),
        "gate": (width, config.mlp_width),
        "up": (width, config.mlp_width),
        "down": (config.mlp_width, width),
    }
    shapes = {"embedding": (config.vocab_size, width), "final_norm": (width,)}
    if not config.tied_embeddings:
        shapes["head"] = (width, config.vocab_size)
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    stacked = {name: jax.ShapeDtypeStruct((config.num_layers, *shape), jnp.float32) for name, shape in layers.items()}
    return {**tree, "layers": stacked}


# Where a parameter is cut when a model is spread over devices: for each axis of `parameter_shapes`, the mesh axis that splits it, or None.
# "tp" (tensor parallelism) cuts heads, hidden units and tokens of the vocabulary; "fsdp" (fully sharded data parallelism, ZeRO 3,
# arXiv:1910.02054) cuts the residual stream. Norm scales are a few kilobytes, and whole everywhere.
SHARDED_AXES: dict[str, tuple[str | None, ...]] = {
    "embedding": ("tp", "fsdp"),  # [V, D]
    "final_norm": (None,),  # [D]
    "head": ("fsdp", "tp"),  # [D, V]
    "attention_norm": (None, None),  # [L, D]
    "query": (None, "fsdp", "tp", None),  # [L, D, H, Dh]
    "key": (None, "fsdp", "tp", None),  # [L, D, Hkv, Dh]
    "value": (None, "fsdp", "tp", None),  # [L, D, Hkv, Dh]
    "output": (None, "tp", None, "fsdp"),  # [L, H, Dh, D]
    "mlp_norm": (None, None),  # [L, D]
    "gate": (None, "fsdp", "tp"),  # [L, D, F]
    "up": (None, "fsdp", "tp"),  # [L, D, F]
    "down": (None, "tp", "fsdp"),  # [L, F, D]
}


def sharding_faults(config: ModelConfig, *, of: str, fsdp: int, tp: int) -> list[str]:
    """Returns why a model can not be cut over so many devices, one line for each size that does not divide; empty if it can.

    Args:
        config: the model's sizes.
        of: what has these devices, as its keys begin: "learner.mesh".
        fsdp: devices that share the residual stream's axis of each parameter.
        tp: devices that share heads, hidden units and vocabulary.
    """
    sizes = {
        "width": (config.width, "fsdp", fsdp),
        "num_heads": (config.num_heads, "tp", tp),
        "num_kv_heads": (config.num_kv_heads, "tp", tp),
        "mlp_width": (config.mlp_width, "tp", tp),
        "vocab_size": (config.vocab_size, "tp", tp),
    }
    return [
        f"the model's {name} = {size} is not divisible by {of}.{axis} = {parts}: set it to a divisor, {_divisors(size)}"
        for name, (size, axis, parts) in sizes.items()
        if size % parts
    ]


def _divisors(size: int) -> str:
    """The divisors that are usual numbers of devices."""
    return ", ".join(str(n) for n in range(1, min(size, 64) + 1) if size % n == 0)


class Placement(NamedTuple):
    """Where one tensor of a file goes.

    Attributes:
        rule: the rule that names it.
        layer: the row of the stacked parameter; None where the parameter is not stacked.
        source_shape: the shape the file must hold.
        shape: the parameter's shape, without the layer axis.
    """

    rule: TensorRule
    layer: int | None
    source_shape: tuple[int, ...]
    shape: tuple[int, ...]


def placements(model_family: Family, config: ModelConfig) -> dict[str, Placement]:
    """Returns every tensor that a file of this family and these sizes must hold, and nothing else.

    Args:
        model_family: the table of the file's architecture.
        config: the model's sizes.

    Returns:
        Tensor name -> `Placement`, in the order of the table.
    """
    tree = parameter_shapes(config)
    places = {}
    for rule in model_family.tensors:
        if rule.path[0] not in tree:  # a tied model has no head
            continue
        stacked = rule.path[0] == "layers"
        shape = leaf(tree, rule.path).shape[int(stacked) :]
        outputs, inputs = math.prod(shape[rule.input_axes :]), math.prod(shape[: rule.input_axes])
        source_shape = (outputs, inputs) if rule.input_axes else shape
        for layer in range(config.num_layers) if stacked else (None,):
            places[rule.source.format(layer=layer)] = Placement(rule, layer, source_shape, shape)
    return places


def leaf(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """Returns the entry of a nested dict at `path`."""
    return functools.reduce(operator.getitem, path, tree)


def to_parameter(array: np.ndarray, place: Placement) -> np.ndarray:
    """Rearranges one tensor of a file into its parameter.

    Args:
        array: float32, of `place.source_shape`.
        place: the tensor's placement.

    Returns:
        The same values as an array of `place.shape` (a view where it can be).
    """
    if place.rule.interleaved:
        heads = place.shape[1]
        pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, array.shape[1])
        array = pairs.swapaxes(1, 2).reshape(array.shape)
    return array.T.reshape(place.shape) if place.rule.input_axes else array
