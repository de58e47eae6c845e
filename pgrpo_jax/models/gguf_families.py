"""The families of GGUF files, as data: which tensor becomes which parameter, and which metadata key, as llama.cpp writes them, holds which size.

What llama.cpp knows of an architecture and writes into no file (the period of Gemma's windows, the base of their rotary embedding) is a constant here.
"""

import dataclasses
import math
from typing import Any, Mapping, NamedTuple

import numpy as np

from pgrpo_jax.models import gguf_header
from pgrpo_jax.models.config import ModelConfig, RopeScaling
from pgrpo_jax.models.families import TensorRule

ROPE_FACTORS = "rope_freqs.weight"  # [Dh/2], by what the wavelengths of Llama 3's rotary embedding are stretched


class Family(NamedTuple):
    """One architecture of GGUF files.

    Attributes:
        name: its `general.architecture`, also the prefix of its metadata keys.
        tensors: one rule for each parameter.
        constants: field of `ModelConfig` -> what it is in every model of the family.
        optional: field of `ModelConfig` -> (metadata key without the prefix, what llama.cpp takes where a file has none).
        window_period: every so manieth layer attends to all tokens, the others to `attention.sliding_window`; 1 = all layers do.
        usual_window: what llama.cpp takes where a file names no window.
        scaled_embedding: the embedding enters the stream times the square root of the width.
        wide_queries: the number of layers of the family's one model whose scores are divided by the square root of width / heads, not of the head size.
        rope_factors: a file may hold `ROPE_FACTORS`.
    """

    name: str
    tensors: tuple[TensorRule, ...]
    constants: Mapping[str, Any] = {}
    optional: Mapping[str, tuple[str, Any]] = {}
    window_period: int = 1
    usual_window: int | None = None
    scaled_embedding: bool = False
    wide_queries: int = 0
    rope_factors: bool = False


_SIZES = {
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
}
_ROPE_THETA = 10000.0  # what llama.cpp takes where a file names none
# Keys that change the network in a way the transformer does not compute -> the value that switches them off.
_NOT_COMPUTED = {
    "expert_count": 0, "attention.causal": True, "attention.scale": 0.0, "attention.sliding_window": 0, "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0, "rope.scaling.attn_factor": 1.0, "rope.scale_linear": 1.0,
}  # fmt: skip
_HEAD_SIZES = ("rope.dimension_count", "attention.value_length", "rope.dimension_count_swa", "attention.key_length_swa", "attention.value_length_swa")


def _rules(*, interleaved: bool = False, biases: bool = False, qk_norms: bool = False, post_norms: bool = False, shift: float = 0.0) -> tuple[TensorRule, ...]:
    """Returns a rule for each parameter; `interleaved` of queries and keys, `shift` of every norm."""
    norms = {"attention_norm": "attn_norm", "mlp_norm": "ffn_norm"}
    norms |= {"query_norm": "attn_q_norm", "key_norm": "attn_k_norm"} if qk_norms else {}
    norms |= {"post_attention_norm": "post_attention_norm", "post_mlp_norm": "post_ffw_norm"} if post_norms else {}
    projections = {"query": "attn_q", "key": "attn_k", "value": "attn_v"}
    matrices = {name: (source, {"input_axes": 1, "interleaved": interleaved and name != "value"}) for name, source in projections.items()}
    matrices |= {"output": ("attn_output", {"input_axes": 2})} | {name: (f"ffn_{name}", {"input_axes": 1}) for name in ("gate", "up", "down")}
    layer = {name: (source, {"shift": shift}) for name, source in norms.items()} | matrices
    rules = [TensorRule(f"blk.{{layer}}.{source}.weight", ("layers", name), **how) for name, (source, how) in layer.items()]
    if biases:
        rules += [TensorRule(f"blk.{{layer}}.{source}.bias", ("layers", f"{name}_bias"), flat=True) for name, source in projections.items()]
    tables = [TensorRule("token_embd.weight", ("embedding",)), TensorRule("output_norm.weight", ("final_norm",), shift=shift)]
    return (*tables, TensorRule("output.weight", ("head",), input_axes=1), *rules)


# llama.cpp adds to Gemma's norms the 1 that the network adds, once for all (`ModelConfig.norm_offset`)
_GEMMA = {"activation": "gelu_tanh", "norm_offset": 1.0}
_GEMMA_2_CAPS = {"score_soft_cap": ("attn_logit_softcapping", 50.0), "logit_soft_cap": ("final_logit_softcapping", 30.0)}
FAMILIES = {
    family.name: family
    for family in (
        Family("llama", _rules(interleaved=True), rope_factors=True),
        Family("qwen2", _rules(biases=True), {"qkv_bias": True}),
        Family("qwen3", _rules(qk_norms=True), {"qk_norm": True}),
        Family("gemma", _rules(shift=1.0), _GEMMA, scaled_embedding=True),
        Family(
            "gemma2", _rules(post_norms=True, shift=1.0), {**_GEMMA, "post_norms": True}, _GEMMA_2_CAPS, window_period=2, usual_window=4096,
            scaled_embedding=True, wide_queries=46,
        ),
        Family(
            "gemma3", _rules(qk_norms=True, post_norms=True, shift=1.0), {**_GEMMA, "post_norms": True, "qk_norm": True},
            {"local_rope_theta": ("rope.freq_base_swa", 10000.0), "logit_soft_cap": ("final_logit_softcapping", 0.0)}, window_period=6,
            scaled_embedding=True, wide_queries=62,
        ),
    )
}  # fmt: skip


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


def to_model_config(header: gguf_header.Header) -> ModelConfig:
    """Returns the model that the header of a GGUF file describes; for `ROPE_FACTORS` see `with_rope_factors`.

    Raises:
        ValueError: the architecture is not known, the metadata contradicts itself, or asks for what the network does not compute.
    """
    of = family(header.metadata.get("general.architecture"))
    prefix = f"{of.name}."
    # a list where one number is expected (sizes that differ from layer to layer) counts as missing
    single = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix) and isinstance(value, int | float | str)}
    read = {key for key, _ in of.optional.values()} | ({"attention.sliding_window"} if of.window_period > 1 else set())
    for key, off in _NOT_COMPUTED.items():
        if key not in read and single.get(key, off) != off:
            raise ValueError(f"{prefix}{key} is {single[key]!r}, must be {off!r} or absent: the transformer does not compute it")
    values = _sizes(header.metadata, single, prefix) | dict(of.constants)
    values |= {field: single.get(key, usual) for field, (key, usual) in of.optional.items()}
    numbers = {field: _SIZES[field] for field in ("rope_theta", "norm_epsilon")} | {field: key for field, (key, _) in of.optional.items()}
    for field, key in numbers.items():
        if type(values[field]) is not float:
            raise ValueError(f"{prefix}{key} is {values[field]!r}, must be a floating-point number")
    config = ModelConfig(**values, tied_embeddings="output.weight" not in header.tensors, rope_scaling=_rope_scaling(single, prefix))
    if config.num_layers > len(header.tensors):  # keeps what has one entry a layer from growing with a lie
        raise ValueError(f"num_layers is {config.num_layers}, the file has only {len(header.tensors)} tensors")
    derived: dict[str, Any] = {"windows": _windows(header.metadata, prefix, of, config.num_layers)}
    if of.scaled_embedding:
        derived["embedding_scale"] = math.sqrt(config.width)
    if config.num_layers == of.wide_queries:
        derived["query_scalar"] = config.width / config.num_heads
    return dataclasses.replace(config, **derived)


def with_rope_factors(config: ModelConfig, factors: np.ndarray) -> ModelConfig:
    """Returns the model with Llama 3's scaling of the rotary embedding, of which a file holds only what it does to each wavelength.

    Every published model of that kind has the same constants (those of `RopeScaling`) but for the factor of the longest wavelengths.

    Args:
        config: without scaling.
        factors: the tensor `ROPE_FACTORS`, [Dh/2].

    Raises:
        ValueError: they are not what Llama 3's scaling makes of any factor.
    """
    if config.rope_scaling is not None:
        raise ValueError(f"{ROPE_FACTORS} and rope.scaling.factor both scale the rotary embedding, only one may")
    greatest = float(factors.max())
    if math.isfinite(greatest) and greatest >= 1:
        scaled = dataclasses.replace(config, rope_scaling=RopeScaling(kind="llama3", factor=greatest))
        if np.allclose(config.frequencies() / scaled.frequencies(), factors, rtol=1e-5, atol=0):
            return scaled
    raise ValueError(f"{ROPE_FACTORS} reaches to {greatest}, and is not what Llama 3's scaling (1, 4, 8192 tokens) makes of that factor: others are not computed")


def _sizes(metadata: Mapping[str, Any], single: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The sizes that all families have, as llama.cpp completes them."""
    sizes = {field: single.get(key) for field, key in _SIZES.items()}
    sizes["vocab_size"] = _vocab_size(metadata, sizes["vocab_size"], prefix + _SIZES["vocab_size"])
    heads, width = sizes["num_heads"], sizes["width"]
    whole = type(heads) is int and type(width) is int and heads > 0 and width % heads == 0
    usual = {"num_kv_heads": heads, "rope_theta": _ROPE_THETA, "head_dim": single.get("rope.dimension_count", width // heads if whole else None)}
    sizes |= {field: value for field, value in usual.items() if sizes[field] is None}
    if missing := [prefix + _SIZES[field] for field, value in sizes.items() if value is None]:
        raise ValueError(f"metadata holds no single value for {', '.join(missing)}: the file does not describe a model of one layer size")
    for key in _HEAD_SIZES:
        if single.get(key, sizes["head_dim"]) != sizes["head_dim"]:
            raise ValueError(f"{prefix}{key} is {single[key]!r}, must be the head size {sizes['head_dim']}: other sizes are not computed")
    return sizes


def _vocab_size(metadata: Mapping[str, Any], stated: int | None, key: str) -> int | None:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        return stated
    if not isinstance(tokens, list):
        raise ValueError("tokenizer.ggml.tokens must be a list of strings")
    if stated is not None and stated != len(tokens):
        raise ValueError(f"{key} is {stated}, the tokenizer has {len(tokens)} tokens: they must agree")
    return len(tokens)


def _rope_scaling(single: Mapping[str, Any], prefix: str) -> RopeScaling | None:
    kind, factor = single.get("rope.scaling.type", "linear"), single.get("rope.scaling.factor", 1.0)
    if kind not in ("none", "linear"):
        raise ValueError(f"{prefix}rope.scaling.type is {kind!r}, must be 'none', 'linear' or absent: the transformer does not compute it")
    if type(factor) is not float:
        raise ValueError(f"{prefix}rope.scaling.factor is {factor!r}, must be a floating-point number")
    return None if kind == "none" or factor in (0, 1) else RopeScaling(kind="linear", factor=factor)


def _windows(metadata: Mapping[str, Any], prefix: str, of: Family, num_layers: int) -> tuple[int, ...]:
    if of.window_period == 1:
        return ()
    names = {"attention.sliding_window": of.usual_window, "attention.sliding_window_pattern": of.window_period}
    given = {name: metadata.get(prefix + name, usual) for name, usual in names.items()}
    for name, value in given.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{prefix}{name} is {value!r}, must be a whole number from 1 on")
    size, period = given.values()
    return tuple(0 if (layer + 1) % period == 0 else size for layer in range(num_layers))
