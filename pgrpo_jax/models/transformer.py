"""One decoder-only transformer, the same text (`layers.layer`) for prefill, decoding and training.

A forward pass runs T tokens against zero or more *context segments*: keys and values computed earlier (the prompt). So a prompt is
computed once for all its completions, in generation and in training alike. `Transformer` scans the layers, for training;
generation/decoding.py writes them out, over weights laid out for it.
"""

import functools
from typing import Any, Sequence

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from pgrpo_jax.models import layers, quantised
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


# What the backward pass finds of each layer -> the checkpoint policy, where it has to compute the rest anew.
REMAT = {
    "off": None,
    "keep_matmuls": jax.checkpoint_policies.save_only_these_names(layers.MATMUL),
    "keep_nothing": jax.checkpoint_policies.nothing_saveable,
}


def _scaled_normal(fan_in: int):
    return nn.initializers.normal(fan_in**-0.5)


class Block(nn.Module):
    """`layers.layer` with its parameters, as the scan over layers wants it."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, contexts, masks, angles, sequences):
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
        weights["output"] = weights["output"].reshape(-1, c.width)
        parts = [(k, v, mask[:, None, :]) for (k, v), mask in zip(contexts, masks, strict=True)]
        return layers.layer(c, weights, x, angles, layers.attention_over(parts, sequences))


class Transformer(nn.Module):
    """Decoder-only transformer (Llama family); parameters as `families.parameter_shapes` lists them, layers stacked on [L].

    Attributes:
        config: sizes and constants.
        dtype: of activations and matmuls; parameters keep their own.
        remat: of `REMAT`, what is computed anew in the backward pass: nothing; all of a layer but what its matmuls with weights lead to, most of
            the arithmetic; or the whole layer from its input.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "off"

    @nn.compact
    def __call__(
        self, tokens: chex.Array, positions: chex.Array, context: Sequence[Segment] = (), sequences: chex.Array | None = None
    ) -> tuple[chex.Array, KeyValues]:
        """Runs T tokens a row against a context.

        Args:
            tokens: [B, T] int32. Causal among themselves, so padding on the right is harmless.
            positions: [B, T] int32, tokens from the start of the sequence.
            context: segments every token may attend to.
            sequences: [B, T] int32, where a row holds several sequences: which one a token belongs to; it sees no other. None: one a row.

        Returns:
            (hidden [B, T, D] after the final norm, keys and values of these tokens).
        """
        c = self.config
        chex.assert_rank([tokens, positions], 2)
        embedding = self.param("embedding", _scaled_normal(c.width), (c.vocab_size, c.width))
        x = jnp.take(embedding, tokens, axis=0).astype(self.dtype)
        stack = nn.scan(
            Block if self.remat == "off" else nn.remat(Block, prevent_cse=False, policy=REMAT[self.remat]),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_layers,
        )(c, self.dtype, name="layers")
        contexts = tuple((s.key_values.keys, s.key_values.values) for s in context)
        x, (keys, values) = stack(x, contexts, tuple(s.mask for s in context), layers.rotation(positions, c, self.dtype), sequences)
        scale = self.param("final_norm", nn.initializers.ones, (c.width,))
        if not c.tied_embeddings:
            self.param("head", _scaled_normal(c.width), (c.width, c.vocab_size))
        return layers.rms_norm(x, scale, epsilon=c.norm_epsilon), KeyValues(keys=keys, values=values)


@functools.partial(jax.jit, static_argnums=0)
def initialise(model: Transformer, key: chex.PRNGKey) -> Any:
    """Returns random parameters in the tree of `families.parameter_shapes`: normal, variance 1 / fan-in; norms 1."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, tokens, tokens)["params"]


def forward(
    model: Transformer, params: Any, tokens: chex.Array, positions: chex.Array, context: Sequence[Segment] = (), sequences: chex.Array | None = None
):
    """`Transformer.__call__` on a bare parameter tree; same arguments and returns."""
    return model.apply({"params": params}, tokens, positions, context, sequences)


def logits(params: Any, hidden: chex.Array) -> chex.Array:
    """Returns next-token logits [B, T, V] of hidden states [B, T, D], summed and kept in float32 or wider; weights may be `quantised.Stored`.

    Rounded to bfloat16, a logit of 20 would move in steps of 1/8, and many tokens would tie.
    """
    equation, head = ("btd,dv->btv", params["head"]) if "head" in params else ("btd,vd->btv", params["embedding"])
    head, scales = quantised.read(head, hidden.dtype)
    found = jnp.einsum(equation, hidden, head, preferred_element_type=layers.wide(hidden.dtype))
    return found if scales is None else found * scales.astype(found.dtype)[None, None]


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
