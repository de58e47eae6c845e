"""A model's `config.json`, as Hugging Face's transformers writes it, as a `ModelConfig`: one function a family. And back: `from_model_config`.

Both spellings of the rotary embedding are read, `rope_theta` with `rope_scaling` (before transformers 5) and `rope_parameters`. Keys that may be left
out have the defaults of transformers' own configurations. What the network does not compute is refused by name rather than computed wrongly.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any, Callable, Mapping

from pgrpo_jax.models.config import ModelConfig, RopeScaling

_MOST_BYTES = 2**20  # of a config.json
_REQUIRED = object()
_GELU = "gelu_pytorch_tanh"


class _Values:
    """The keys of a `config.json`, each checked as it is read."""

    def __init__(self, values: Mapping[str, Any]):
        self._values = values

    def get(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Returns a value of a type (a whole number counts as a float); None where it is null or left out and the default is None."""
        value = self._values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"{key} is missing: a config.json of this architecture has it")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"{key} is {value!r}, must be of type {kind.__name__}")
        return value

    def refuse(self, **off: Any) -> None:
        """Refuses keys whose value is another than the one that switches off what is not computed."""
        for key, value in off.items():
            if self._values.get(key) not in (None, value):
                raise ValueError(f"{key} is {self._values[key]!r}, must be {value!r} or absent: the transformer does not compute it")

    def sizes(self, *, head_dim: int | None, tied: bool) -> dict[str, Any]:
        """Returns what all families have; `head_dim` None = width / heads."""
        heads, width = self.get("num_attention_heads", int), self.get("hidden_size", int)
        return {
            "num_layers": self.get("num_hidden_layers", int), "width": width, "mlp_width": self.get("intermediate_size", int), "num_heads": heads,
            "num_kv_heads": self.get("num_key_value_heads", int, heads), "vocab_size": self.get("vocab_size", int),
            "head_dim": self.get("head_dim", int, head_dim or width // max(1, heads)), "context_length": self.get("max_position_embeddings", int),
            "norm_epsilon": self.get("rms_norm_eps", float, 1e-6), "tied_embeddings": self.get("tie_word_embeddings", bool, tied),
        }  # fmt: skip

    def rope(self, layers: str | None = None, *, theta: float = 10000.0) -> tuple[float, RopeScaling | None]:
        """Returns (base, scaling) of the rotary embedding, of a kind of layers where kinds differ; `theta` where no base is named."""
        given = self.get("rope_parameters", dict, None)
        old = self.get("rope_scaling", dict, None) or {} if layers != "sliding_attention" else {}
        named = self.get("rope_theta", float, theta) if layers != "sliding_attention" else theta
        rope = _Values((given.get(layers) or {}) if given and layers in given else given or {"rope_theta": named, **old})
        rope.refuse(partial_rotary_factor=1.0)
        base, kind = rope.get("rope_theta", float, named), rope.get("rope_type", str, rope.get("type", str, "default"))
        if kind == "default":
            return base, None
        values = {"low_factor": "low_freq_factor", "high_factor": "high_freq_factor"} if kind == "llama3" else {}
        read = {name: rope.get(key, float) for name, key in values.items()}
        if kind == "llama3":
            read["original_context"] = rope.get("original_max_position_embeddings", int)
        return base, RopeScaling(kind=kind, factor=rope.get("factor", float, 1.0), **read)

    def windows(self, num_layers: int, usual: Callable[[int], bool]) -> tuple[int, ...]:
        """Returns the window of each layer, 0 = none; `usual` says which layers have one where `layer_types` does not."""
        kinds = self.get("layer_types", list, None) or ["sliding_attention" if usual(layer) else "full_attention" for layer in range(num_layers)]
        if unknown := set(map(str, kinds)) - {"sliding_attention", "full_attention"}:
            raise ValueError(f"layer_types hold {', '.join(sorted(unknown))}: only sliding_attention and full_attention are computed")
        if "sliding_attention" not in kinds:
            return ()
        size = self.get("sliding_window", int)
        return tuple(size if kind == "sliding_attention" else 0 for kind in kinds)


def _llama(c: _Values) -> ModelConfig:
    c.refuse(attention_bias=False, mlp_bias=False, hidden_act="silu")
    theta, scaling = c.rope()
    return ModelConfig(**c.sizes(head_dim=None, tied=False), rope_theta=theta, rope_scaling=scaling)


def _qwen(c: _Values, *, qk_norm: bool) -> ModelConfig:
    c.refuse(attention_bias=False, hidden_act="silu")
    sizes, (theta, scaling) = c.sizes(head_dim=128 if qk_norm else None, tied=False), c.rope()
    first = c.get("max_window_layers", int, 28)
    windows = c.windows(sizes["num_layers"], lambda layer: layer >= first) if c.get("use_sliding_window", bool, False) else ()
    return ModelConfig(**sizes, rope_theta=theta, rope_scaling=scaling, windows=windows, qk_norm=qk_norm, qkv_bias=not qk_norm)


def _qwen_3_moe(c: _Values) -> ModelConfig:
    c.refuse(attention_bias=False, hidden_act="silu", decoder_sparse_step=1, mlp_only_layers=[])
    sizes, (theta, scaling) = c.sizes(head_dim=None, tied=False), c.rope()
    sizes["mlp_width"] = c.get("moe_intermediate_size", int)
    window = c.get("sliding_window", int) if c.get("use_sliding_window", bool, False) else 0  # of all layers, or of none
    return ModelConfig(
        **sizes, rope_theta=theta, rope_scaling=scaling, windows=(window,) * sizes["num_layers"] if window else (), qk_norm=True,
        num_experts=c.get("num_local_experts", int, None) or c.get("num_experts", int),  # as transformers 5 and as the files on the hub name it
        experts_per_token=c.get("num_experts_per_tok", int), normalised_experts=c.get("norm_topk_prob", bool, False),
    )  # fmt: skip


def _gemma(c: _Values) -> dict[str, Any]:
    """What the generations of Gemma have in common."""
    c.refuse(attention_bias=False, use_bidirectional_attention=False)
    sizes = c.sizes(head_dim=256, tied=True)
    return {**sizes, "activation": "gelu_tanh", "norm_offset": 1.0, "embedding_scale": math.sqrt(sizes["width"])}


def _gemma_1(c: _Values) -> ModelConfig:
    activation = c.get("hidden_activation", str, None) or c.get("hidden_act", str, _GELU)
    if activation not in (_GELU, "gelu"):  # "gelu" stands for the approximation, in the first files
        raise ValueError(f"hidden_activation is {activation!r}, must be {_GELU!r}: others are not computed")
    theta, scaling = c.rope()
    return ModelConfig(**_gemma(c), rope_theta=theta, rope_scaling=scaling)


def _gemma_2(c: _Values) -> ModelConfig:
    c.refuse(hidden_activation=_GELU)
    values, (theta, scaling) = _gemma(c), c.rope()
    caps = {"score_soft_cap": "attn_logit_softcapping", "logit_soft_cap": "final_logit_softcapping"}
    return ModelConfig(
        **values, rope_theta=theta, rope_scaling=scaling, post_norms=True, query_scalar=c.get("query_pre_attn_scalar", float, 256.0),
        windows=c.windows(values["num_layers"], lambda layer: layer % 2 == 0), **{name: c.get(key, float, 0.0) for name, key in caps.items()},
    )  # fmt: skip


def _gemma_3(c: _Values) -> ModelConfig:
    c.refuse(hidden_activation=_GELU, attn_logit_softcapping=0.0, final_logit_softcapping=0.0)
    values, (theta, scaling) = _gemma(c), c.rope("full_attention", theta=1e6)
    local, of_local = c.rope("sliding_attention", theta=c.get("rope_local_base_freq", float, 1e4))
    if of_local is not None:
        raise ValueError(f"the rotary embedding of sliding_attention layers is scaled ({of_local.kind}): only that of full_attention layers may be")
    pattern = c.get("sliding_window_pattern", int, 6)
    return ModelConfig(
        **values, rope_theta=theta, rope_scaling=scaling, local_rope_theta=local, post_norms=True, qk_norm=True,
        query_scalar=c.get("query_pre_attn_scalar", float, 256.0), windows=c.windows(values["num_layers"], lambda layer: (layer + 1) % pattern != 0),
    )  # fmt: skip


ARCHITECTURES: dict[str, Callable[[_Values], ModelConfig]] = {
    "LlamaForCausalLM": _llama,
    "Qwen2ForCausalLM": lambda c: _qwen(c, qk_norm=False),
    "Qwen3ForCausalLM": lambda c: _qwen(c, qk_norm=True),
    "Qwen3MoeForCausalLM": _qwen_3_moe,
    "GemmaForCausalLM": _gemma_1,
    "Gemma2ForCausalLM": _gemma_2,
    "Gemma3ForCausalLM": _gemma_3,
}


def read_config(directory: str | pathlib.Path) -> ModelConfig:
    """Reads the `config.json` of a model's directory.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, of an architecture not known here, or asks for what the network does not compute.
    """
    file = pathlib.Path(directory) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"no config.json in {directory}: give a Hugging Face directory, or a GGUF file")
    if file.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, at most {_MOST_BYTES}: it is not a model's configuration")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return to_model_config(values)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from None


def to_model_config(values: Any) -> ModelConfig:
    """Returns the model that the values of a `config.json` describe.

    Raises:
        ValueError: as `read_config`.
    """
    named = values.get("architectures") if isinstance(values, dict) else None
    name = named[0] if isinstance(named, list) and len(named) == 1 and isinstance(named[0], str) else None
    if name not in ARCHITECTURES:
        raise ValueError(f"architectures is {named!r}, known are {', '.join(ARCHITECTURES)}: choose a model of one of them")
    return ARCHITECTURES[name](_Values(values))


# (activation, qkv_bias, qk_norm, post_norms, experts) -> (architecture, its model_type)
_NAMES = {
    ("silu", False, False, False, False): ("LlamaForCausalLM", "llama"),
    ("silu", True, False, False, False): ("Qwen2ForCausalLM", "qwen2"),
    ("silu", False, True, False, False): ("Qwen3ForCausalLM", "qwen3"),
    ("silu", False, True, False, True): ("Qwen3MoeForCausalLM", "qwen3_moe"),
    ("gelu_tanh", False, False, False, False): ("GemmaForCausalLM", "gemma"),
    ("gelu_tanh", False, False, True, False): ("Gemma2ForCausalLM", "gemma2"),
    ("gelu_tanh", False, True, True, False): ("Gemma3ForCausalLM", "gemma3_text"),
}
_SIZES = {
    "num_layers": "num_hidden_layers", "width": "hidden_size", "mlp_width": "intermediate_size", "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "vocab_size": "vocab_size", "context_length": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps", "rope_theta": "rope_theta", "tied_embeddings": "tie_word_embeddings",
}  # fmt: skip


def from_model_config(config: ModelConfig) -> dict[str, Any]:
    """Returns values of a `config.json` that describe a model, the inverse of `to_model_config`, which reads them back before they are returned.

    The rotary embedding is spelled as before transformers 5, because its versions from then on read that as well.

    Raises:
        ValueError: no architecture known here describes the model; it says which of the model's values the nearest one can not have.
    """
    named = _NAMES.get((config.activation, config.qkv_bias, config.qk_norm, config.post_norms, config.num_experts > 0))
    if named is None:
        raise ValueError(
            f"no architecture has activation {config.activation!r}, qkv_bias {config.qkv_bias}, qk_norm {config.qk_norm}, post_norms "
            f"{config.post_norms} and {config.num_experts} experts together (known are {', '.join(ARCHITECTURES)}): it can not be written as a Hugging Face directory"
        )
    values: dict[str, Any] = {"architectures": [named[0]], "model_type": named[1]}
    values |= {key: getattr(config, field) for field, key in _SIZES.items()}
    values |= {"hidden_act": "silu"} if config.activation == "silu" else {"hidden_act": _GELU, "hidden_activation": _GELU}
    values |= _scaling(config.rope_scaling) | _layers(config) | _experts(config)
    read = dataclasses.asdict(to_model_config(values))
    if lost := [f"{name} {value!r} (it has {read[name]!r})" for name, value in dataclasses.asdict(config).items() if read[name] != value]:
        raise ValueError(f"{named[0]}, the nearest architecture, can not have {', '.join(lost)}: it can not be written as a Hugging Face directory")
    return values


def _scaling(rope: RopeScaling | None) -> dict[str, Any]:
    if rope is None:
        return {}
    values = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        values |= {"low_freq_factor": rope.low_factor, "high_freq_factor": rope.high_factor, "original_max_position_embeddings": rope.original_context}
    return {"rope_scaling": values}


def _experts(config: ModelConfig) -> dict[str, Any]:
    if not config.num_experts:
        return {}
    sizes = {"num_experts": config.num_experts, "num_experts_per_tok": config.experts_per_token, "moe_intermediate_size": config.mlp_width}
    return sizes | {"norm_topk_prob": config.normalised_experts, "decoder_sparse_step": 1, "mlp_only_layers": []}


def _layers(config: ModelConfig) -> dict[str, Any]:
    """What layers of several kinds have, and the scales and caps that come with post-norms."""
    values: dict[str, Any] = {}
    if any(config.windows):
        values = {"use_sliding_window": True, "sliding_window": max(config.windows)}
    if config.windows or config.post_norms:  # where they are not named, transformers counts off which have a window
        values["layer_types"] = ["sliding_attention" if config.window(layer) else "full_attention" for layer in range(config.num_layers)]
    if config.post_norms:
        scalar = config.query_scalar
        values["query_pre_attn_scalar"] = int(scalar) if scalar is not None and scalar.is_integer() else scalar  # transformers wants whole numbers whole
        values |= {"attn_logit_softcapping": config.score_soft_cap or None, "final_logit_softcapping": config.logit_soft_cap or None}
    if config.local_rope_theta is not None:
        values["rope_local_base_freq"] = config.local_rope_theta
    return values
