"""One decoder-only transformer, the same text (`layers.layer`) for prefill, decoding and training.

A forward pass runs T tokens against zero or more *context segments*: keys and values computed earlier (the prompt). So a prompt is
computed once for all its completions, in generation and in training alike. `Transformer` scans the layers, for training;
generation/decoding.py writes them out, over weights laid out for it.
"""

import dataclasses
import functools
import math
from typing import Any, Sequence

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pgrpo_jax.models import attention, layers, lora, quantised
from pgrpo_jax.models.config import ModelConfig
from pgrpo_jax.models.parameters import parameter_shapes


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
        positions: [Bs, S] int32, tokens from the start of the sequence.
    """

    key_values: KeyValues
    mask: chex.Array
    positions: chex.Array


# What the backward pass finds of each layer -> the checkpoint policy, where it has to compute the rest anew.
REMAT = {
    "off": None,
    "keep_matmuls": jax.checkpoint_policies.save_only_these_names(layers.MATMUL),
    "keep_nothing": jax.checkpoint_policies.nothing_saveable,
}


def _scaled_normal(fan_in: int):
    return nn.initializers.normal(fan_in**-0.5)


def _initialiser(name: str, shape: tuple[int, ...], config: ModelConfig) -> Any:
    """Of a parameter without the axis of layers: norms 1 as they are applied, biases and what adapters add 0, matrices normal with variance 1 / fan-in."""
    if "norm" in name:
        return nn.initializers.constant(1 - config.norm_offset)
    if "bias" in name or name.endswith(lora.B):
        return nn.initializers.zeros
    if name.endswith(lora.A):
        return _scaled_normal(math.prod(shape[1:-1]))
    if name.startswith("expert"):
        return _scaled_normal(shape[1])
    return _scaled_normal(math.prod(shape[:-1]) if name == "output" else config.width if name == "embedding" else shape[0])


class Block(nn.Module):
    """`layers.layer` with its parameters, as the scan over layers wants it."""

    config: ModelConfig
    dtype: Any
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x, contexts, kind, fixed):
        """Scanned over layers: x [B, T, D] is carried; `contexts` holds this layer's (keys, values) of each segment, `kind` its (window, place among
        the angles), None where all are alike; `fixed` is the same for all (segments' masks and positions, the tokens' positions and sequences, angles, rows' adapters)."""
        c, (window, place), (masks, places, positions, sequences, angles, adapters) = self.config, kind, fixed
        shapes = {name: spec.shape[1:] for name, spec in parameter_shapes(c)["layers"].items()}
        weights = {name: self.param(name, _initialiser(name, shape, c), shape) for name, shape in shapes.items()}
        weights = {name: w if "norm" in name or name == "router" else w.astype(self.dtype) for name, w in weights.items()}
        weights["output"] = weights["output"].reshape(-1, c.width)
        parts = [(k, v, mask[:, None, :], at) for (k, v), mask, at in zip(contexts, masks, places, strict=True)]
        angles = angles if place is None else jax.tree.map(lambda both: jnp.take(both, place, axis=0), angles)
        attended = attention.attention_over(c, parts, positions, window=window, sequences=sequences, mesh=self.mesh)
        return layers.layer(c, weights, x, angles, attended, adapters=adapters, mesh=self.mesh)


class Transformer(nn.Module):
    """Decoder-only transformer; parameters as `parameter_shapes` lists them, layers stacked on [L].

    Attributes:
        config: sizes and constants.
        dtype: of activations and matmuls; parameters keep their own.
        remat: of `REMAT`, what is computed anew in the backward pass: nothing; all of a layer but what its matmuls with weights lead to, most of
            the arithmetic; or the whole layer from its input.
        mesh: of `laid_over`; None = one device; several are left to the compiler, which on TPUs refuses.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "off"
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self, tokens: chex.Array, positions: chex.Array, context: Sequence[Segment] = (), sequences: chex.Array | None = None,
        adapters: chex.Array | None = None,
    ) -> tuple[chex.Array, KeyValues]:  # fmt: skip
        """Runs T tokens a row against a context.

        Args:
            tokens: [B, T] int32. Causal among themselves, so padding on the right is harmless.
            positions: [B, T] int32, tokens from the start of the sequence.
            context: segments every token may attend to.
            sequences: [B, T] int32, where a row holds several sequences: which one a token belongs to; it sees no other. None: one a row.
            adapters: [B] int32, which of the model's adapters each row uses; not read where it has at most one.

        Returns:
            (hidden [B, T, D] after the final norm, keys and values of these tokens).
        """
        c = self.config
        chex.assert_rank([tokens, positions], 2)
        shapes = parameter_shapes(c)
        tables = {name: self.param(name, _initialiser(name, spec.shape, c), spec.shape) for name, spec in shapes.items() if name != "layers"}
        x = embed(c, jnp.take(tables["embedding"], tokens, axis=0).astype(self.dtype))
        stack = nn.scan(
            Block if self.remat == "off" else nn.remat(Block, prevent_cse=False, policy=REMAT[self.remat]),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast),
            length=c.num_layers,
        )(c, self.dtype, self.mesh, name="layers")
        contexts = tuple((s.key_values.keys, s.key_values.values) for s in context)
        kinds, angles = self._kinds(positions, tokens.shape[1] + sum(s.mask.shape[1] for s in context))
        fixed = (tuple(s.mask for s in context), tuple(s.positions for s in context), positions, sequences, angles, adapters)
        x, (keys, values) = stack(x, contexts, kinds, fixed)
        x = layers.rms_norm(x, tables["final_norm"], epsilon=c.norm_epsilon, offset=c.norm_offset)
        return x, KeyValues(keys=keys, values=values)

    def _kinds(self, positions: chex.Array, longest: int) -> tuple[Any, Any]:
        """Returns ((windows [L], places among the angles [L]), angles); each None where all layers are alike on sequences of `longest` tokens."""
        c, windows, places = self.config, None, None
        limited = np.array([c.window(layer) for layer in range(c.num_layers)], np.int32)
        if np.any((limited > 0) & (limited < longest)):
            windows = jnp.asarray(np.where(limited > 0, limited, longest))
        angles = layers.rotation(positions, c, self.dtype)
        if c.local_rope_theta and np.any(limited):
            places = jnp.asarray(np.where(limited > 0, 1, 0), jnp.int32)
            angles = jax.tree.map(lambda *both: jnp.stack(both), angles, layers.rotation(positions, c, self.dtype, local=True))
        return (windows, places), angles


def laid_over(model: Transformer, mesh: Mesh | None) -> Transformer:
    """Returns a model as it runs over a mesh that its parameters lie on: experts exchange tokens there, kernels are split; the rest is the compiler's."""
    return dataclasses.replace(model, mesh=mesh) if mesh is not None and mesh.size > 1 else model


def embed(config: ModelConfig, x: chex.Array) -> chex.Array:
    """Returns looked-up embeddings [B, T, D] as they enter the stream."""
    return x if config.embedding_scale == 1 else x * jnp.asarray(config.embedding_scale, x.dtype)


@functools.partial(jax.jit, static_argnums=0)
def initialise(model: Transformer, key: chex.PRNGKey) -> Any:
    """Returns random parameters in the tree of `parameters.parameter_shapes`: normal, variance 1 / fan-in; norms 1."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, tokens, tokens)["params"]


def forward(
    model: Transformer, params: Any, tokens: chex.Array, positions: chex.Array, context: Sequence[Segment] = (), sequences: chex.Array | None = None,
    adapters: chex.Array | None = None,
):  # fmt: skip
    """`Transformer.__call__` on a bare parameter tree; same arguments and returns."""
    return model.apply({"params": params}, tokens, positions, context, sequences, adapters)


def logits(params: Any, hidden: chex.Array, soft_cap: float = 0.0) -> chex.Array:
    """Returns next-token logits [B, T, V] of hidden states [B, T, D], summed and kept in float32 or wider; weights may be `quantised.Stored`.

    They are capped as `ModelConfig.logit_soft_cap` says, which the caller hands on.

    Rounded to bfloat16, a logit of 20 would move in steps of 1/8, and many tokens would tie.
    """
    equation, head = ("btd,dv->btv", params["head"]) if "head" in params else ("btd,vd->btv", params["embedding"])
    head, scales = quantised.read(head, hidden.dtype)
    found = jnp.einsum(equation, hidden, head, preferred_element_type=quantised.wide(hidden.dtype))
    return attention.capped(found if scales is None else found * scales.astype(found.dtype)[None, None], soft_cap)


def prefill(model: Transformer, params: Any, prompts: chex.Array, lengths: chex.Array, adapters: chex.Array | None = None) -> Segment:
    """Computes prompts once, as context for any number of completions.

    The last token of each prompt is left out: it is the first *input* of every completion, so that each sampled token comes
    from the same kind of step in generation and in training.

    Args:
        prompts: [P, Tp] int32, padded on the right.
        lengths: [P] int32, tokens, at least 1.
        adapters: [P] int32, as of `Transformer`.

    Returns:
        Segment of Tp tokens for P rows.
    """
    chex.assert_rank([prompts, lengths], [2, 1])
    columns = jnp.arange(prompts.shape[1], dtype=jnp.int32)[None, :]
    positions = jnp.broadcast_to(columns, prompts.shape)
    _, key_values = forward(model, params, prompts, positions, adapters=adapters)
    return Segment(key_values=key_values, mask=columns < lengths[:, None] - 1, positions=positions)


def last_tokens(prompts: chex.Array, lengths: chex.Array) -> chex.Array:
    """Returns [P] int32, the last token of each right-padded prompt [P, Tp] of `lengths` [P]."""
    return jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0]
