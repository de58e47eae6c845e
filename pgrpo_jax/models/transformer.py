"""One decoder-only transformer, the same text for prefill, decoding and training.

A forward pass runs T tokens against zero or more *context segments*: keys and values computed earlier (the prompt, the decode
cache). So a prompt is computed once for all its completions, in generation and in training alike.
"""

import functools
from typing import Any, Sequence

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from pgrpo_jax.models.families import ModelConfig


@chex.dataclass(frozen=True, mappable_dataclass=False)
class KeyValues:
    """Keys (rotated) and values of some tokens, all layers.

    Attributes:
        keys: [L, B, S, Hkv, Dh].
        values: [L, B, S, Hkv, Dh].
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


def rotate(x: chex.Array, positions: chex.Array, *, theta: float) -> chex.Array:
    """Rotary position embedding, rotate-half order (Su et al. 2021, arXiv:2104.09864).

    Args:
        x: [B, T, heads, Dh] queries or keys.
        positions: [B, T] int32, tokens from the start of the sequence.
        theta: base of the geometric progression of wavelengths.

    Returns:
        [B, T, heads, Dh], the dtype of x; angles are computed in float32 or wider.
    """
    chex.assert_rank([x, positions], [4, 2])
    half, wide = x.shape[-1] // 2, _wide(x.dtype)
    frequencies = jnp.asarray(theta, wide) ** (-jnp.arange(half, dtype=wide) / half)
    angles = positions.astype(wide)[:, :, None, None] * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(query: chex.Array, parts: Sequence[tuple[chex.Array, chex.Array, chex.Array]]) -> chex.Array:
    """Grouped-query attention over several parts of a context, with one softmax over all of them.

    Args:
        query: [B, T, H, Dh].
        parts: (keys [Bs, S, Hkv, Dh], values [Bs, S, Hkv, Dh], mask [Bs or 1, T or 1, S] bool); Bs divides B.

    Returns:
        [B, T, H, Dh], the dtype of query; scores and softmax in float32 or wider.
    """
    batch, length, heads, head_dim = query.shape
    scores, wide = [], _wide(query.dtype)
    for keys, _, mask in parts:
        rows, size, kv_heads, _ = keys.shape
        q = query.reshape(rows, batch // rows, length, kv_heads, heads // kv_heads, head_dim)
        s = jnp.einsum("brtkgd,bskd->brkgts", q, keys, preferred_element_type=wide) * jnp.asarray(head_dim**-0.5, wide)
        s = jnp.where(mask[:, None, None, None, :, :], s, jnp.asarray(jnp.finfo(wide).min, wide))
        scores.append(s.reshape(batch, kv_heads, heads // kv_heads, length, size))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(query.dtype)
    outputs, start = [], 0
    for keys, values, _ in parts:
        rows, size, kv_heads, _ = keys.shape
        w = weights[..., start : start + size].reshape(rows, batch // rows, kv_heads, heads // kv_heads, length, size)
        outputs.append(jnp.einsum("brkgts,bskd->brtkgd", w, values).reshape(batch, length, heads, head_dim))
        start += size
    return sum(outputs[1:], outputs[0])


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


class Block(nn.Module):
    """One layer: attention over (context segments, these tokens), then a gated MLP; both residual, pre-normalised."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, contexts, masks, positions):
        """Scanned over layers: x [B, T, D] is carried, `contexts` holds this layer's (keys, values) of each segment."""
        c, dtype = self.config, self.dtype
        weight = lambda name, shape, fan_in: self.param(name, _scaled_normal(fan_in), shape).astype(dtype)  # noqa: E731
        ones = lambda name: self.param(name, nn.initializers.ones, (c.width,))  # noqa: E731
        length = x.shape[1]

        h = rms_norm(x, ones("attention_norm"), epsilon=c.norm_epsilon)
        query = jnp.einsum("btd,dhk->bthk", h, weight("query", (c.width, c.num_heads, c.head_dim), c.width))
        keys = jnp.einsum("btd,dhk->bthk", h, weight("key", (c.width, c.num_kv_heads, c.head_dim), c.width))
        values = jnp.einsum("btd,dhk->bthk", h, weight("value", (c.width, c.num_kv_heads, c.head_dim), c.width))
        query, keys = rotate(query, positions, theta=c.rope_theta), rotate(keys, positions, theta=c.rope_theta)
        causal = jnp.tril(jnp.ones((length, length), bool))[None]
        parts = [(k, v, mask[:, None, :]) for (k, v), mask in zip(contexts, masks, strict=True)]
        attended = attend(query, [*parts, (keys, values, causal)])
        x = x + jnp.einsum("bthk,hkd->btd", attended, weight("output", (c.num_heads, c.head_dim, c.width), c.num_heads * c.head_dim))

        h = rms_norm(x, ones("mlp_norm"), epsilon=c.norm_epsilon)
        gate = jnp.einsum("btd,df->btf", h, weight("gate", (c.width, c.mlp_width), c.width))
        up = jnp.einsum("btd,df->btf", h, weight("up", (c.width, c.mlp_width), c.width))
        x = x + jnp.einsum("btf,fd->btd", jax.nn.silu(gate) * up, weight("down", (c.mlp_width, c.width), c.mlp_width))
        return x, (keys, values)


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
        x, (keys, values) = layers(x, contexts, tuple(s.mask for s in context), positions)
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
