"""One decoder-only transformer, the same text (`layer`) for prefill, decoding and training.

A forward pass runs T tokens against zero or more *context segments*: keys and values computed earlier (the prompt). So a prompt is
computed once for all its completions, in generation and in training alike. `Transformer` scans the layers, for training;
generation/decoding.py writes them out, over weights laid out for it.
"""

import functools
from typing import Any, Callable, Mapping, Sequence

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from pgrpo_jax.models.families import ModelConfig


@chex.dataclass(frozen=True, mappable_dataclass=False)
class KeyValues:
    """Keys (rotated) and values of some tokens, all layers, as the two matmuls of attention read them: nothing is transposed on the way.

    Attributes:
        keys: [L, B, Hkv, Dh, S].
        values: [L, B, Hkv, S, Dh].
    """

    keys: chex.Array
    values: chex.Array


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Segment:
    """Context that every token of a forward pass may attend to.

    Attributes:
        key_values: of S tokens for Bs rows; Bs divides the batch B, and rows `b` with the same `b // (B / Bs)` share one.
        mask: [Bs, S] bool, True where a token may be attended to.
    """

    key_values: KeyValues
    mask: chex.Array


def rotation(positions: chex.Array, config: ModelConfig, dtype: Any) -> tuple[chex.Array, chex.Array]:
    """Angles of the rotary position embedding (Su et al. 2021, arXiv:2104.09864), the same for every layer.

    Args:
        positions: [B, T] int32, tokens from the start of the sequence.
        config: of whose sizes the head's and `rope_theta`, the base of the geometric progression of wavelengths, are read.
        dtype: of the result; angles are computed in float32 or wider.

    Returns:
        (cosines, sines), each [B, T, 1, Dh/2].
    """
    chex.assert_rank(positions, 2)
    half, wide = config.head_dim // 2, _wide(dtype)
    frequencies = jnp.asarray(config.rope_theta, wide) ** (-jnp.arange(half, dtype=wide) / half)
    angles = positions.astype(wide)[:, :, None, None] * frequencies[None, None, None, :]
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: chex.Array, angles: tuple[chex.Array, chex.Array]) -> chex.Array:
    """Rotates queries or keys [B, T, heads, Dh] by `rotation`, rotate-half order."""
    chex.assert_rank(x, 4)
    (cos, sin), half = angles, x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(query: chex.Array, parts: Sequence[tuple[chex.Array, chex.Array, chex.Array]]) -> chex.Array:
    """Grouped-query attention over several parts of a context, with one softmax over all of them.

    Args:
        query: [B, T, H, Dh].
        parts: (keys [Bs, Hkv, Dh, S], values [Bs, Hkv, S, Dh], mask [B or Bs or 1, T or 1, S] bool); Bs divides B.

    Returns:
        [B, T, H, Dh], the dtype of query; scores and softmax in float32 or wider.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads, wide, scores = parts[0][0].shape[1], _wide(query.dtype), []
    grouped = (kv_heads, heads // kv_heads, length)  # query heads that share a key head lie next to each other
    query = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    for keys, _, mask in parts:
        rows, size = keys.shape[0], keys.shape[-1]
        s = jnp.matmul(_by_row(query, rows), keys, preferred_element_type=wide) * jnp.asarray(head_dim**-0.5, wide)
        s = s.reshape(rows, kv_heads, batch // rows, heads // kv_heads, length, size)
        mask = mask.reshape(rows, -1, *mask.shape[1:]) if len(mask) == batch else mask[:, None]
        s = jnp.where(mask[:, None, :, None, :, :], s, jnp.asarray(jnp.finfo(wide).min, wide))
        scores.append(s.swapaxes(1, 2).reshape(batch, *grouped, size))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(query.dtype)
    outputs, start = [], 0
    for keys, values, _ in parts:
        rows, size = keys.shape[0], keys.shape[-1]
        out = jnp.matmul(_by_row(weights[..., start : start + size], rows), values)
        out = out.reshape(rows, kv_heads, batch // rows, heads // kv_heads, length, head_dim)
        outputs.append(out.swapaxes(1, 2).reshape(batch, *grouped, head_dim))
        start += size
    return sum(outputs[1:], outputs[0]).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def _by_row(x: chex.Array, rows: int) -> chex.Array:
    """[B, Hkv, G, T, *] -> [Bs, Hkv, B/Bs·G·T, *]: everything that meets the same keys in one matrix."""
    batch, kv_heads, *_, last = x.shape
    return x.reshape(rows, batch // rows, *x.shape[1:]).swapaxes(1, 2).reshape(rows, kv_heads, -1, last)


def rms_norm(x: chex.Array, scale: chex.Array, *, epsilon: float) -> chex.Array:
    """Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467), computed in float32 or wider.

    Args:
        x: [B, T, D].
        scale: [D].
        epsilon: added to the mean square.

    Returns:
        [B, T, D], the dtype of x.
    """
    wide = x.astype(_wide(x.dtype))
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + jnp.asarray(epsilon, wide.dtype))
    return (wide * inverse * scale.astype(wide.dtype)[None, None, :]).astype(x.dtype)


def _wide(dtype: Any) -> Any:
    """float32 for half-precision types, the type itself otherwise."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def _scaled_normal(fan_in: int):
    return nn.initializers.normal(fan_in**-0.5)


# (queries [B, T, H, Dh], keys [B, Hkv, Dh, T], values [B, Hkv, T, Dh]) -> (attended [B, T, H, Dh], what the layer returns beside it)
Attention = Callable[[chex.Array, chex.Array, chex.Array], tuple[chex.Array, Any]]


def attention_over(parts: Sequence[tuple[chex.Array, chex.Array, chex.Array]]) -> Attention:
    """Returns attention over `parts` of a context (of `attend`) and, causally, over the tokens themselves; it returns their keys and values."""

    def attention(query, keys, values):
        causal = jnp.tril(jnp.ones((query.shape[1],) * 2, bool))[None]
        return attend(query, [*parts, (keys, values, causal)]), (keys, values)

    return attention


def layer(
    config: ModelConfig, weights: Mapping[str, chex.Array], x: chex.Array, angles: tuple[chex.Array, chex.Array], attention: Attention
) -> tuple[chex.Array, Any]:
    """One layer: attention, then a gated MLP; both residual, pre-normalised.

    Args:
        config: the model's sizes.
        weights: of `families.parameter_shapes`, without the axis of layers, in the dtype of x; or of `decoding.lay_out`, which has
            "query_key_value" [D, Hkv, H/Hkv + 2, Dh] and "gate_up" [D, 2, F] in place of the five matrices they are made of.
        x: [B, T, D].
        angles: of `rotation`.
        attention: what the tokens attend to.

    Returns:
        (x after the layer, what `attention` returned beside the attended values).
    """
    h = rms_norm(x, weights["attention_norm"], epsilon=config.norm_epsilon)
    if "query_key_value" in weights:
        fused = jnp.einsum("btd,dhgk->bthgk", h, weights["query_key_value"])
        query = fused[:, :, :, :-2].reshape(*x.shape[:2], config.num_heads, config.head_dim)
        keys, values = fused[:, :, :, -2], fused[:, :, :, -1]
    else:
        query, keys, values = [jnp.einsum("btd,dhk->bthk", h, weights[name]) for name in ("query", "key", "value")]
    query, keys = rotate(query, angles), rotate(keys, angles)
    attended, kept = attention(query, keys.transpose(0, 2, 3, 1), values.swapaxes(1, 2))
    x = x + jnp.einsum("bthk,hkd->btd", attended, weights["output"])

    h = rms_norm(x, weights["mlp_norm"], epsilon=config.norm_epsilon)
    if "gate_up" in weights:
        gate, up = jnp.moveaxis(jnp.einsum("btd,dgf->btgf", h, weights["gate_up"]), 2, 0)
    else:
        gate, up = [jnp.einsum("btd,df->btf", h, weights[name]) for name in ("gate", "up")]
    return x + jnp.einsum("btf,fd->btd", jax.nn.silu(gate) * up, weights["down"]), kept


class Block(nn.Module):
    """`layer` with its parameters, as the scan over layers wants it."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, contexts, masks, angles):
        """Scanned over layers: x [B, T, D] is carried, `contexts` holds this layer's (keys, values) of each segment."""
        c, ones = self.config, nn.initializers.ones
        wide, inner, mlp = _scaled_normal(c.width), _scaled_normal(c.num_heads * c.head_dim), _scaled_normal(c.mlp_width)
        shapes = {
            "attention_norm": (ones, (c.width,)),
            "query": (wide, (c.width, c.num_heads, c.head_dim)),
            "key": (wide, (c.width, c.num_kv_heads, c.head_dim)),
            "value": (wide, (c.width, c.num_kv_heads, c.head_dim)),
            "output": (inner, (c.num_heads, c.head_dim, c.width)),
            "mlp_norm": (ones, (c.width,)),
            "gate": (wide, (c.width, c.mlp_width)),
            "up": (wide, (c.width, c.mlp_width)),
            "down": (mlp, (c.mlp_width, c.width)),
        }
        weights = {name: self.param(name, *what) for name, what in shapes.items()}
        weights = {name: w if "norm" in name else w.astype(self.dtype) for name, w in weights.items()}
        parts = [(k, v, mask[:, None, :]) for (k, v), mask in zip(contexts, masks, strict=True)]
        return layer(c, weights, x, angles, attention_over(parts))


class Transformer(nn.Module):
    """Decoder-only transformer (Llama family); parameters as `families.parameter_shapes` lists them, layers stacked on [L].

    Attributes:
        config: sizes and constants.
        dtype: of activations and matmuls; parameters keep their own.
        remat: recompute each layer in the backward pass.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, tokens: chex.Array, positions: chex.Array, context: Sequence[Segment] = ()) -> tuple[chex.Array, KeyValues]:
        """Runs T tokens a row against a context.

        Args:
            tokens: [B, T] int32. Causal among themselves, so padding on the right is harmless.
            positions: [B, T] int32, tokens from the start of the sequence.
            context: segments every token may attend to.

        Returns:
            (hidden [B, T, D] after the final norm, keys and values of these tokens).
        """
        c = self.config
        chex.assert_rank([tokens, positions], 2)
        embedding = self.param("embedding", _scaled_normal(c.width), (c.vocab_size, c.width))
        x = jnp.take(embedding, tokens, axis=0).astype(self.dtype)
        layers = nn.scan(
            nn.remat(Block, prevent_cse=False) if self.remat else Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=c.num_layers,
        )(c, self.dtype, name="layers")
        contexts = tuple((s.key_values.keys, s.key_values.values) for s in context)
        x, (keys, values) = layers(x, contexts, tuple(s.mask for s in context), rotation(positions, c, self.dtype))
        scale = self.param("final_norm", nn.initializers.ones, (c.width,))
        if not c.tied_embeddings:
            self.param("head", _scaled_normal(c.width), (c.width, c.vocab_size))
        return rms_norm(x, scale, epsilon=c.norm_epsilon), KeyValues(keys=keys, values=values)


@functools.partial(jax.jit, static_argnums=0)
def initialise(model: Transformer, key: chex.PRNGKey) -> Any:
    """Returns random parameters in the tree of `families.parameter_shapes`: normal, variance 1 / fan-in; norms 1."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, tokens, tokens)["params"]


def forward(model: Transformer, params: Any, tokens: chex.Array, positions: chex.Array, context: Sequence[Segment] = ()):
    """`Transformer.__call__` on a bare parameter tree; same arguments and returns."""
    return model.apply({"params": params}, tokens, positions, context)


def logits(params: Any, hidden: chex.Array) -> chex.Array:
    """Returns next-token logits [B, T, V] of hidden states [B, T, D], summed and kept in float32 or wider.

    Rounded to bfloat16, a logit of 20 would move in steps of 1/8, and many tokens would tie.
    """
    equation, head = ("btd,dv->btv", params["head"]) if "head" in params else ("btd,vd->btv", params["embedding"])
    return jnp.einsum(equation, hidden, head.astype(hidden.dtype), preferred_element_type=_wide(hidden.dtype))


def prefill(model: Transformer, params: Any, prompts: chex.Array, lengths: chex.Array) -> Segment:
    """Computes prompts once, as context for any number of completions.

    The last token of each prompt is left out: it is the first *input* of every completion, so that each sampled token comes
    from the same kind of step in generation and in training.

    Args:
        prompts: [P, Tp] int32, padded on the right.
        lengths: [P] int32, tokens, at least 1.

    Returns:
        Segment of Tp tokens for P rows.
    """
    chex.assert_rank([prompts, lengths], [2, 1])
    columns = jnp.arange(prompts.shape[1], dtype=jnp.int32)[None, :]
    _, key_values = forward(model, params, prompts, jnp.broadcast_to(columns, prompts.shape))
    return Segment(key_values=key_values, mask=columns < lengths[:, None] - 1)


def last_tokens(prompts: chex.Array, lengths: chex.Array) -> chex.Array:
    """Returns [P] int32, the last token of each right-padded prompt [P, Tp] of `lengths` [P]."""
    return jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0]
