"""The parameter tree of a model, and where each parameter is cut when a model is spread over devices."""

import dataclasses
import functools
import operator
from typing import Any, Mapping

import jax
import jax.numpy as jnp

from pgrpo_jax.models import lora
from pgrpo_jax.models.config import ModelConfig


def parameter_shapes(config: ModelConfig) -> dict[str, Any]:
    """Returns the parameter tree of a model as shapes.

    Args:
        config: the model's sizes.

    Returns:
        A tree of float32 `jax.ShapeDtypeStruct`: embedding [V, D], final_norm [D], head [D, V] where the embeddings are not
        tied, and under "layers", stacked over L: attention_norm [L, D], query [L, D, H, Dh], key and value [L, D, Hkv, Dh],
        output [L, H, Dh, D], mlp_norm [L, D], gate and up [L, D, F], down [L, F, D]; with experts, in place of these three, router [L, D, E],
        expert_gate and expert_up [L, E, D, F], expert_down [L, E, F, D]; and where the model has them query_bias [L, H, Dh],
        key_bias and value_bias [L, Hkv, Dh], query_norm and key_norm [L, Dh], post_attention_norm and post_mlp_norm [L, D], and the adapters of
        `lora.shapes`, behind the axis L.
    """
    width, heads, kv_heads, head_dim = config.width, config.num_heads, config.num_kv_heads, config.head_dim
    layers = {
        "attention_norm": (width,),
        "query": (width, heads, head_dim),
        "key": (width, kv_heads, head_dim),
        "value": (width, kv_heads, head_dim),
        "output": (heads, head_dim, width),
        "mlp_norm": (width,),
    }
    mlp = {"gate": (width, config.mlp_width), "up": (width, config.mlp_width), "down": (config.mlp_width, width)}
    if config.num_experts:
        layers |= {"router": (width, config.num_experts)}
        mlp = {f"expert_{name}": (config.num_experts, *shape) for name, shape in mlp.items()}
    layers |= mlp
    if config.qkv_bias:
        layers |= {"query_bias": (heads, head_dim), "key_bias": (kv_heads, head_dim), "value_bias": (kv_heads, head_dim)}
    if config.qk_norm:
        layers |= {"query_norm": (head_dim,), "key_norm": (head_dim,)}
    if config.post_norms:
        layers |= {"post_attention_norm": (width,), "post_mlp_norm": (width,)}
    if config.lora is not None:
        layers |= lora.shapes(config.lora, layers)
    shapes = {"embedding": (config.vocab_size, width), "final_norm": (width,)}
    if not config.tied_embeddings:
        shapes["head"] = (width, config.vocab_size)
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    stacked = {name: jax.ShapeDtypeStruct((config.num_layers, *shape), jnp.float32) for name, shape in layers.items()}
    return {**tree, "layers": stacked}


# Where a parameter is cut when a model is spread over devices: for each axis of `parameter_shapes`, the mesh axis that splits it, or None.
# "tp" (tensor parallelism) cuts heads, hidden units and tokens of the vocabulary; "fsdp" (fully sharded data parallelism, ZeRO 3,
# arXiv:1910.02054) cuts the residual stream; "expert" (expert parallelism, arXiv:2006.16668) deals out whole experts. Norm scales are a few
# kilobytes, and whole everywhere.
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
    "router": (None, "fsdp", None),  # [L, D, E]
    "expert_gate": (None, "expert", "fsdp", "tp"),  # [L, E, D, F]
    "expert_up": (None, "expert", "fsdp", "tp"),  # [L, E, D, F]
    "expert_down": (None, "expert", "tp", "fsdp"),  # [L, E, F, D]
    "query_bias": (None, "tp", None),  # [L, H, Dh]
    "key_bias": (None, "tp", None),  # [L, Hkv, Dh]
    "value_bias": (None, "tp", None),  # [L, Hkv, Dh]
    "query_norm": (None, None),  # [L, Dh]
    "key_norm": (None, None),  # [L, Dh]
    "post_attention_norm": (None, None),  # [L, D]
    "post_mlp_norm": (None, None),  # [L, D]
}
SHARDED_AXES |= lora.cuts(SHARDED_AXES)


def trainable_shapes(config: ModelConfig) -> dict[str, Any]:
    """Returns what of `parameter_shapes` is trained, published and saved: the adapters where the model has some, else all of it."""
    return lora.trainable(config.lora, parameter_shapes(config))


def frozen_shapes(config: ModelConfig) -> dict[str, Any]:
    """Returns the rest of `parameter_shapes`, what adapters are added to; {} where everything is trained."""
    return {} if config.lora is None else parameter_shapes(dataclasses.replace(config, lora=None))


def sharding_faults(config: ModelConfig, *, of: str, fsdp: int, tp: int, expert: int = 1) -> list[str]:
    """Returns why a model can not be cut over so many devices, one line for each size that does not divide; empty if it can.

    Args:
        config: the model's sizes.
        of: what has these devices, as its keys begin: "learner.mesh".
        fsdp: devices that share the residual stream's axis of each parameter.
        tp: devices that share heads, hidden units and vocabulary.
        expert: devices that share the experts.
    """
    if expert > 1 and not config.num_experts:
        return [f"{of}.expert = {expert}, but the model is dense, it has no experts to deal out: set it to 1, and {of}.fsdp to more"]
    sizes = {
        "width": (config.width, "fsdp", fsdp),
        "num_heads": (config.num_heads, "tp", tp),
        "num_kv_heads": (config.num_kv_heads, "tp", tp),
        "mlp_width": (config.mlp_width, "tp", tp),
        "vocab_size": (config.vocab_size, "tp", tp),
        "num_experts": (config.num_experts, "expert", expert),
    }
    return [
        f"the model's {name} = {size} is not divisible by {of}.{axis} = {parts}: set it to a divisor, {_divisors(size)}"
        for name, (size, axis, parts) in sizes.items()
        if size % parts
    ]


def _divisors(size: int) -> str:
    """The divisors that are usual numbers of devices."""
    return ", ".join(str(n) for n in range(1, min(size, 64) + 1) if size % n == 0)


def leaf(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """Returns the entry of a nested dict at `path`."""
    return functools.reduce(operator.getitem, path, tree)
