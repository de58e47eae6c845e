"""The sizes and constants of a model, as the network reads them; hugging_face.py and gguf_families.py find them in a model's files."""

import dataclasses
import math

import numpy as np

from pgrpo_jax.models.lora import Lora

_SIZE_LIMIT = 2**31  # sizes index int32 arrays
ACTIVATIONS = ("silu", "gelu_tanh")
ROPE_SCALINGS = ("linear", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How wavelengths of the rotary embedding are stretched for contexts longer than those a model was first trained on.

    Attributes:
        kind: "linear", all of them by `factor` (Chen et al. 2023, arXiv:2306.15595); or "llama3", those longer than original_context / low_factor
            by `factor`, those shorter than original_context / high_factor not at all, and those between by as much as lies between.
        factor: at least 1.
        low_factor: "llama3" only.
        high_factor: "llama3" only; above low_factor.
        original_context: "llama3" only, tokens.
    """

    kind: str
    factor: float
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self):
        if self.kind not in ROPE_SCALINGS:
            raise ValueError(f"rope scaling {self.kind!r} is not computed: known are {', '.join(ROPE_SCALINGS)}")
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"rope scaling's factor is {self.factor}, must be in [1, inf): 1 changes nothing")
        if not 0 < self.low_factor < self.high_factor < math.inf or self.original_context < 1:
            raise ValueError(
                f"rope scaling's low_factor {self.low_factor}, high_factor {self.high_factor} and original_context {self.original_context} must be "
                "positive, and the high factor above the low one: Llama 3 has 1, 4 and 8192"
            )

    def scaled(self, frequencies: np.ndarray) -> np.ndarray:
        """Returns the frequencies [half], radians a token, of the stretched wavelengths."""
        if self.kind == "linear":
            return frequencies / self.factor
        turns = self.original_context * frequencies / (2 * math.pi)  # in the original context
        kept = np.clip((turns - self.low_factor) / (self.high_factor - self.low_factor), 0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer with RMSNorm, gated MLPs and rotate-half RoPE: its sizes, and in what it differs from Llama.

    Attributes:
        num_layers: L.
        width: D, the residual stream.
        mlp_width: F, the hidden layer of the MLP; of each expert, where there are experts.
        num_heads: H, query heads.
        num_kv_heads: Hkv, key and value heads; divides H.
        head_dim: Dh; even, because RoPE rotates pairs.
        vocab_size: V.
        context_length: tokens the model was trained to attend over.
        rope_theta: base of the RoPE wavelengths.
        norm_epsilon: added to the mean square inside RMSNorm.
        tied_embeddings: True where the embedding is also the output head.
        activation: of the MLP's gate, one of `ACTIVATIONS`.
        qkv_bias: queries, keys and values have a bias.
        qk_norm: each head's queries and keys are normalised before they are rotated.
        post_norms: what attention and MLP give is normalised before it is added to the stream.
        norm_offset: added to every norm scale; 1 where a model's files hold the difference to 1.
        embedding_scale: of the embedding where it enters the stream.
        query_scalar: scores are divided by its square root; None = head_dim.
        score_soft_cap: c of c·tanh(score / c) in attention; 0 = none.
        logit_soft_cap: the same of the logits.
        windows: for each layer, the tokens that one attends to, itself included; 0 = all before it. () = all, in every layer.
        local_rope_theta: the base in layers with a window, which `rope_scaling` leaves alone; None = as in the others.
        rope_scaling: None = wavelengths are as `rope_theta` says.
        num_experts: E, MLPs of each layer among which each token's router chooses; 0 = one MLP for all tokens.
        experts_per_token: k, how many of them a token goes through.
        normalised_experts: the probabilities of a token's k experts are divided by their sum; otherwise they are those among all E.
        lora: the adapters that are trained in place of the model; None = it has none.
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
    activation: str = "silu"
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    query_scalar: float | None = None
    score_soft_cap: float = 0.0
    logit_soft_cap: float = 0.0
    windows: tuple[int, ...] = ()
    local_rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    normalised_experts: bool = False
    lora: Lora | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.default == 0 else 1
            if field.type is int and (type(value) is not int or not least <= value < _SIZE_LIMIT):
                raise ValueError(f"{field.name} is {value!r}, must be a whole number in [{least}, {_SIZE_LIMIT}): correct the model's sizes")
            if field.type is bool and type(value) is not bool:
                raise ValueError(f"{field.name} is {value!r}, must be True or False")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}, must be a multiple of num_kv_heads {self.num_kv_heads}: each key/value head serves "
                "the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, must be even: RoPE rotates pairs of channels")
        for name in ("rope_theta", "local_rope_theta", "embedding_scale", "query_scalar"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}, must be finite and above 0: {'10000 is the usual value' if 'rope' in name else 'correct it'}")
        for name in ("norm_offset", "score_soft_cap", "logit_soft_cap"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, must be in [0, inf): 0 = none")
        if not 0 < self.norm_epsilon < 1:
            raise ValueError(f"norm_epsilon is {self.norm_epsilon}, must be in (0, 1): 1e-5 is the usual value")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}, must be one of {', '.join(ACTIVATIONS)}: others are not computed")
        if self.windows and (len(self.windows) != self.num_layers or min(self.windows) < 0):
            raise ValueError(f"windows are {self.windows}, must be one for each of {self.num_layers} layers, 0 or more tokens")
        if not min(1, self.num_experts) <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token is {self.experts_per_token}, must be in [{min(1, self.num_experts)}, num_experts = {self.num_experts}]: "
                "a token goes through some of the experts there are"
            )
        if self.lora is not None and self.num_experts and (wanted := {"gate", "up", "down"}.intersection(self.lora.targets)):
            raise ValueError(f"lora's targets are {' '.join(self.lora.targets)!r}, experts have no adapters: leave out {', '.join(sorted(wanted))}")

    def window(self, layer: int) -> int:
        """Returns the tokens that one attends to in a layer; 0 = all before it."""
        return self.windows[layer] if self.windows else 0

    def frequencies(self, *, local: bool = False) -> np.ndarray:
        """Returns the frequencies of the rotary embedding.

        Args:
            local: of layers with a window.

        Returns:
            [Dh/2] float64, radians a token.
        """
        theta = self.local_rope_theta if local and self.local_rope_theta else self.rope_theta
        frequencies = theta ** (-np.arange(self.head_dim // 2) / (self.head_dim // 2))
        scaled = self.rope_scaling is not None and not (local and self.local_rope_theta)
        return self.rope_scaling.scaled(frequencies) if scaled else frequencies
