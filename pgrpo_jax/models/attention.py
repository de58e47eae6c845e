"""Attention over parts of a context with one softmax over all of them: what a prompt, a ring of a cache and the tokens themselves are to a layer."""

from typing import Any, Callable, Sequence

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from pgrpo_jax.models.config import ModelConfig
from pgrpo_jax.models.mesh import device, row_axes
from pgrpo_jax.models.quantised import plain, read, Stored, wide

Part = tuple[Stored, Stored, chex.Array, chex.Array]  # keys [Bs, Hkv, Dh, S], values [Bs, Hkv, S, Dh], mask [Bs, 1, S], positions [Bs, S]
_AMPERE = 8.0  # compute capability


def attend(
    query: chex.Array, parts: Sequence[tuple[Stored, Stored, chex.Array]], *, scale: float | None = None, soft_cap: float = 0.0
) -> chex.Array:
    """Grouped-query attention over several parts of a context, with one softmax over all of them.

    Args:
        query: [B, T, H, Dh].
        parts: (keys [Bs, Hkv, Dh, S], values [Bs, Hkv, S, Dh], mask [B or Bs or 1, T or 1, S] bool); Bs divides B. Keys and values may be
            stored in less room, each token's vector with a scale.
        scale: that scores are multiplied by; None = Dh^-0.5.
        soft_cap: c of c·tanh(score / c) (Gemma 2, arXiv:2408.00118); 0 = none.

    Returns:
        [B, T, H, Dh], the dtype of query; scores and softmax in float32 or wider.
    """
    batch, length, heads, head_dim = query.shape
    read_parts = [(*read(keys, query.dtype), *read(values, query.dtype), mask) for keys, values, mask in parts]
    kv_heads, exact, scores = read_parts[0][0].shape[1], wide(query.dtype), []
    scale = jnp.asarray(head_dim**-0.5 if scale is None else scale, exact)
    grouped = (kv_heads, heads // kv_heads, length)  # query heads that share a key head lie next to each other
    query = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    for keys, scales, _, _, mask in read_parts:
        rows, size = keys.shape[0], keys.shape[-1]
        s = jnp.matmul(_by_row(query, rows), keys, preferred_element_type=exact) * scale
        s = s if scales is None else s * scales.astype(exact)[:, :, None, :]
        s = capped(s, soft_cap).reshape(rows, kv_heads, batch // rows, heads // kv_heads, length, size)
        mask = mask.reshape(rows, -1, *mask.shape[1:]) if len(mask) == batch else mask[:, None]
        s = jnp.where(mask[:, None, :, None, :, :], s, jnp.asarray(jnp.finfo(exact).min, exact))
        scores.append(s.swapaxes(1, 2).reshape(batch, *grouped, size))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(query.dtype)
    outputs, start = [], 0
    for _, _, values, scales, _ in read_parts:
        rows, size = values.shape[0], values.shape[2]
        part = _by_row(weights[..., start : start + size], rows)
        out = jnp.matmul(part if scales is None else part * scales[:, :, None, :], values)
        out = out.reshape(rows, kv_heads, batch // rows, heads // kv_heads, length, head_dim)
        outputs.append(out.swapaxes(1, 2).reshape(batch, *grouped, head_dim))
        start += size
    return sum(outputs[1:], outputs[0]).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def _by_row(x: chex.Array, rows: int) -> chex.Array:
    """[B, Hkv, G, T, *] -> [Bs, Hkv, B/Bs·G·T, *]: everything that meets the same keys in one matrix."""
    batch, kv_heads, *_, last = x.shape
    return x.reshape(rows, batch // rows, *x.shape[1:]).swapaxes(1, 2).reshape(rows, kv_heads, -1, last)


def attend_by_cudnn(
    query: chex.Array, parts: Sequence[tuple[Stored, Stored, chex.Array]], *, scale: float, mesh: Mesh | None = None, implementation: str = "cudnn"
) -> chex.Array:
    """`attend` without a cap by the kernel that `jax.nn.dot_product_attention` has for GPUs.

    It wants all keys in one piece, with a copy for each row, and its mask is an array [B, T, S] of the dtype of query, once for all heads.

    Args:
        query, parts, scale: as for `attend`.
        mesh: as of `on_mesh`.
        implementation: of `jax.nn.dot_product_attention`.

    Returns:
        As `attend`.
    """
    pairs = tuple((plain(keys, query.dtype, axis=2), plain(values, query.dtype, axis=3)) for keys, values, _ in parts)

    def on_device(query: chex.Array, pairs: Any, masks: Any) -> chex.Array:
        batch, length = query.shape[:2]
        keys = jnp.concatenate([_to_rows(keys, batch).transpose(0, 3, 1, 2) for keys, _ in pairs], axis=1)
        values = jnp.concatenate([_to_rows(values, batch).swapaxes(1, 2) for _, values in pairs], axis=1)
        whole = [jnp.broadcast_to(_to_rows(mask, batch), (batch, length, mask.shape[-1])) for mask in masks]
        mask = jnp.concatenate(whole, axis=2)[:, None]
        return jax.nn.dot_product_attention(query, keys, values, mask=mask, scale=scale, implementation=implementation)

    return on_mesh(mesh, on_device, query, pairs, tuple(mask for *_, mask in parts))


def on_mesh(mesh: Mesh | None, run: Callable[..., chex.Array], query: chex.Array, pairs: Any, marks: Any, *rest: chex.Array) -> chex.Array:
    """Runs a kernel on each device for its rows and heads: it is nothing that the compiler could split.

    Args:
        mesh: what the arrays lie on: heads over "tp", rows over its other axes; None = one device.
        run: of what is given here, or a device's part of it.
        query: [B, T, H, Dh].
        pairs: a tree of arrays [Bs, Hkv, *, *]; Bs divides B, rows b with the same b // (B / Bs) share one.
        marks: a tree of arrays [Bs, ...].
        rest: arrays that all devices read whole.

    Returns:
        [B, T, H, Dh].
    """
    if mesh is None:
        return run(query, pairs, marks, *rest)
    rows, heads = row_axes(mesh, len(query)), "tp" if "tp" in mesh.axis_names else None

    def divisible(x: chex.Array) -> chex.Array:
        return x if rows is None or len(x) == 1 or row_axes(mesh, len(x)) is not None else _to_rows(x, len(query))

    def rows_of(x: chex.Array) -> Any:
        return None if len(x) == 1 and len(query) > 1 else rows

    pairs, marks = jax.tree.map(divisible, (pairs, marks))
    of_pairs, of_marks = jax.tree.map(lambda x: PartitionSpec(rows_of(x), heads), pairs), jax.tree.map(lambda x: PartitionSpec(rows_of(x)), marks)
    specs = (PartitionSpec(rows, None, heads), of_pairs, of_marks, *[PartitionSpec()] * len(rest))
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(query, pairs, marks, *rest)


# (queries [B, T, H, Dh], keys [B, Hkv, Dh, T], values [B, Hkv, T, Dh]) -> (attended [B, T, H, Dh], what the layer returns beside it)
Attention = Callable[[chex.Array, chex.Array, chex.Array], tuple[chex.Array, Any]]


def attention_over(
    config: ModelConfig, parts: Sequence[Part], positions: chex.Array, *, window: Any = None, sequences: chex.Array | None = None,
    mesh: Mesh | None = None,
) -> Attention:  # fmt: skip
    """Returns attention over `parts` of a context and, causally, over the tokens themselves; it returns their keys and values.

    Many tokens at once, so that scores are what costs: on TPUs they stay in the core (flash_attention.py), on GPUs in cuDNN's kernel,
    where it has one; elsewhere it is `attend`, as it is for the one token of a decoding step, which reads caches and little else.

    Args:
        config: of which the scale and the cap of scores are read.
        parts: every token attends to, where their masks and the window allow it; Bs divides the batch B.
        positions: [B, T] int32, of the tokens, counted from the start of the sequence as those of the parts are.
        window: int32 scalar, tokens that one attends to, itself included; None = all.
        sequences: [B, T] int32 from -1, the sequence that each token belongs to, where a row holds several; None: one a row.
        mesh: as of `on_mesh`, what the arrays lie on; several devices without it are left to the compiler, which on TPUs refuses.
    """
    scale, soft_cap = constants(config).values()

    def near(where: chex.Array) -> chex.Array:
        return positions[:, :, None] - _to_rows(where, len(positions))[:, None, :] < window

    def attention(query, keys, values):
        runs_on = device(mesh)
        if runs_on.platform == "tpu":
            from pgrpo_jax.models.flash_attention import flash_attention  # here: other platforms do without Pallas' half a second of start-up

            limits = {"window": window, "sequences": sequences, "scale": scale, "soft_cap": soft_cap}
            return flash_attention(query, keys, values, parts, positions, mesh=mesh, **limits), (keys, values)
        own, context = jnp.tril(jnp.ones((query.shape[1],) * 2, bool))[None], [part[:3] for part in parts]
        if sequences is not None:
            own = own & (sequences[:, :, None] == sequences[:, None, :])
        if window is not None:
            own = own & near(positions)
            context = [(k, v, _to_rows(mask, len(positions)) & near(where)) for k, v, mask, where in parts]
        everything = [*context, (keys, values, own)]
        if cudnn_takes(runs_on, query, everything, soft_cap):
            return attend_by_cudnn(query, everything, scale=scale, mesh=mesh), (keys, values)
        return attend(query, everything, scale=scale, soft_cap=soft_cap), (keys, values)

    return attention


def cudnn_takes(runs_on: jax.Device, query: chex.Array, parts: Sequence[tuple[Stored, Stored, chex.Array]], soft_cap: float) -> bool:
    """Whether cuDNN has a kernel for this and its gradient: NVIDIA from Ampere on, half precision, no cap, even lengths, heads of 8 to 128 numbers."""
    if runs_on.platform != "gpu" or "cuda" not in runs_on.client.platform_version or float(runs_on.compute_capability) < _AMPERE:
        return False
    length, _, head_dim = query.shape[1:]
    even = length % 2 == 0 and sum(mask.shape[-1] for *_, mask in parts) % 2 == 0
    return query.dtype in (jnp.bfloat16, jnp.float16) and not soft_cap and even and head_dim % 8 == 0 and head_dim <= 128


def constants(config: ModelConfig) -> dict[str, float]:
    """Returns the `scale` and the `soft_cap` of `attend` for a model."""
    return {"scale": (config.query_scalar or config.head_dim) ** -0.5, "soft_cap": config.score_soft_cap}


def _to_rows(x: chex.Array, batch: int) -> chex.Array:
    """[Bs, ...] -> [B, ...], each row as often as rows of the batch share it."""
    return jnp.repeat(x, batch // len(x), axis=0)


def capped(x: chex.Array, soft_cap: float) -> chex.Array:
    """Returns c·tanh(x / c), between -c and c; x itself where c is 0."""
    return x if not soft_cap else jnp.tanh(x / jnp.asarray(soft_cap, x.dtype)) * jnp.asarray(soft_cap, x.dtype)
