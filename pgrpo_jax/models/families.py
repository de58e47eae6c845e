"""Where model files keep each parameter, as data: which tensor becomes which parameter.

Adding a family means adding a table in gguf_families.py, or a function in hugging_face.py; loaders and the network read them and stay as they are.
"""

import itertools
import math
import string
from typing import Mapping, NamedTuple, Sequence

import numpy as np

from pgrpo_jax.models.config import ModelConfig
from pgrpo_jax.models.parameters import leaf, parameter_shapes


class TensorRule(NamedTuple):
    """How one tensor of a model file becomes one parameter, or one row of a parameter that is stacked over what its name counts.

    Attributes:
        source: the tensor's name in the file, with "{layer}" and then "{expert}" where the parameter is stacked over them.
        path: the parameter's place in the tree of `parameter_shapes`.
        input_axes: 0 where the file holds the parameter as it is; otherwise the file holds a matrix [outputs, inputs], and
            this is how many leading axes of the parameter (without the stacked axes) are inputs.
        interleaved: True where the rows of each head are ordered for RoPE over neighbouring pairs (0, 1), (2, 3), ...;
            the transformer rotates halves, (0, Dh/2), (1, Dh/2 + 1), ....
        flat: True where the file holds the parameter's axes (without the stacked axes) as one.
        shift: what the file's numbers have more than the parameter's.
    """

    source: str
    path: tuple[str, ...]
    input_axes: int = 0
    interleaved: bool = False
    flat: bool = False
    shift: float = 0.0


class Placement(NamedTuple):
    """Where one tensor of a file goes.

    Attributes:
        rule: the rule that names it.
        row: of the stacked parameter, an index of each stacked axis: (layer,), (layer, expert), or () where the parameter is not stacked.
        source_shape: the shape the file must hold.
        shape: the parameter's shape, without the stacked axes.
    """

    rule: TensorRule
    row: tuple[int, ...]
    source_shape: tuple[int, ...]
    shape: tuple[int, ...]


def hugging_face_rules(config: ModelConfig) -> tuple[TensorRule, ...]:
    """Returns a rule for each parameter of a Hugging Face directory; the architectures differ only in what a norm is called."""
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.post_norms:
        norms |= {"post_attention_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm", "post_mlp_norm": "post_feedforward_layernorm"}
    attention = {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj", "output": "self_attn.o_proj"}
    layer = {name: (source, {}) for name, source in norms.items()}
    layer |= {name: (source, {"input_axes": 2 if name == "output" else 1}) for name, source in attention.items()}
    layer |= {name: (f"mlp.{name}_proj", {"input_axes": 1}) for name in ("gate", "up", "down")}
    layer |= {f"expert_{name}": (f"mlp.experts.{{expert}}.{name}_proj", {"input_axes": 1}) for name in ("gate", "up", "down")}
    layer |= {"router": ("mlp.gate", {"input_axes": 1}), "query_norm": ("self_attn.q_norm", {}), "key_norm": ("self_attn.k_norm", {})}
    rules = [TensorRule(f"model.layers.{{layer}}.{source}.weight", ("layers", name), **how) for name, (source, how) in layer.items()]
    biases = {f"{name}_bias": f"{source}.bias" for name, source in attention.items() if name != "output"}
    rules += [TensorRule(f"model.layers.{{layer}}.{source}", ("layers", name), flat=True) for name, source in biases.items()]
    tables = [TensorRule("model.embed_tokens.weight", ("embedding",)), TensorRule("model.norm.weight", ("final_norm",))]
    return (*tables, TensorRule("lm_head.weight", ("head",), input_axes=1), *rules)


def placements(rules: Sequence[TensorRule], config: ModelConfig) -> dict[str, Placement]:
    """Returns every tensor that a file of these sizes must hold, and nothing else.

    Args:
        rules: of the file's family; those of parameters that the model does not have are left out.
        config: the model's sizes.

    Returns:
        Tensor name -> `Placement`, in the order of the rules.
    """
    tree = parameter_shapes(config)
    places = {}
    for rule in rules:
        if rule.path[-1] not in leaf(tree, rule.path[:-1]):  # a tied model has no head
            continue
        counted = [{"layer": config.num_layers, "expert": config.num_experts}[field] for field in _fields(rule.source)]
        shape = leaf(tree, rule.path).shape[len(counted) :]
        outputs, inputs = math.prod(shape[rule.input_axes :]), math.prod(shape[: rule.input_axes])
        source_shape = (outputs, inputs) if rule.input_axes else (outputs,) if rule.flat else shape
        for row in itertools.product(*map(range, counted)):
            name = rule.source.format(**dict(zip(("layer", "expert"), row)))
            places[name] = Placement(rule, row, source_shape, shape)
    return places


def _fields(source: str) -> list[str]:
    """What a tensor's name counts, in order."""
    return [field for _, field, _, _ in string.Formatter().parse(source) if field]


def settle(found: Mapping[str, tuple[int, ...]], places: Mapping[str, Placement]) -> None:
    """Compares the tensors of a file with those of the model, both ways.

    Args:
        found: name -> shape, of the file.
        places: of `placements`.

    Raises:
        ValueError: they differ; every difference is in the one error.
    """
    missing = [name for name in places if name not in found]
    unexpected = [name for name in found if name not in places]
    misshapen = [
        f"{name} is {found[name]}, must be {place.source_shape}" for name, place in places.items() if name in found and found[name] != place.source_shape
    ]
    accounts = (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen))
    if any(names for _, names in accounts):
        listed = "; ".join(f"{title} ({len(names)}): {', '.join(names)}" for title, names in accounts if names)
        raise ValueError(f"tensors do not fit the model: {listed}; use a file made for this architecture")


def to_parameter(array: np.ndarray, place: Placement) -> np.ndarray:
    """Rearranges one tensor of a file into its parameter.

    Args:
        array: float32, of `place.source_shape`.
        place: the tensor's placement.

    Returns:
        The same values, less the rule's shift, as an array of `place.shape` (a view where it can be).
    """
    if place.rule.shift:
        array = array - np.asarray(place.rule.shift, array.dtype)
    if place.rule.interleaved:
        heads = place.shape[1]
        pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, array.shape[1])
        array = pairs.swapaxes(1, 2).reshape(array.shape)
    return (array.T if place.rule.input_axes else array).reshape(place.shape)


def from_parameter(array: np.ndarray, place: Placement) -> np.ndarray:
    """Returns a parameter [place.shape] as a file holds it, [place.source_shape]; the inverse of `to_parameter`."""
    if place.rule.input_axes:
        array = array.reshape(place.source_shape[::-1]).T
    if place.rule.interleaved:
        heads = place.shape[1]
        halves = array.reshape(heads, 2, array.shape[0] // heads // 2, array.shape[1])
        array = halves.swapaxes(1, 2).reshape(array.shape)
    if place.rule.shift:
        array = array + np.asarray(place.rule.shift, array.dtype)
    return array.reshape(place.source_shape)
