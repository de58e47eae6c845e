"""The device's side of generation: the model laid out for decoding, its caches, and many steps in one program.

Every row of the batch, a *slot*, works on one completion; when it has ended the next one takes its place (slots.py decides which). All
slots write their keys and values into the same column of a ring, that of the step: a slot's own tokens are the last `age` columns, so that
a newcomer needs no clearing, and no write is scattered. Slots lie in blocks that share the caches of the few prompts their
completions answer.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from pgrpo_jax.generation import sampler
from pgrpo_jax.models import layers, transformer
from pgrpo_jax.models.transformer import Transformer

Caches = tuple[tuple[chex.Array, chex.Array], ...]  # of each layer: keys [*, Hkv, Dh, S], values [*, Hkv, S, Dh]


@chex.dataclass(frozen=True, mappable_dataclass=False)
class SlotState:
    """What the B slots work on; arrays [B].

    Attributes:
        completions: int32, which completion; names its random numbers.
        inputs: int32, the token that the next step reads.
        positions: int32, its place in the sequence, prompt included.
        ages: int32, tokens drawn so far.
        limits: int32, tokens after which the completion is cut.
        running: bool, False where it has ended.
        places: int32, which of its block's prompts it answers.
        prompt_lengths: int32, tokens of that prompt.
    """

    completions: chex.Array
    inputs: chex.Array
    positions: chex.Array
    ages: chex.Array
    limits: chex.Array
    running: chex.Array
    places: chex.Array
    prompt_lengths: chex.Array


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Drawn:
    """What the slots have drawn; token i of a completion that began at step b lies in column (b + i) mod size.

    Attributes:
        tokens: [B, size] int32.
        log_probs: [B, size] float32.
    """

    tokens: chex.Array
    log_probs: chex.Array


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Until:
    """When a run of steps comes back to the host; all int32 scalars.

    Attributes:
        step: at this step at the latest.
        running: when no more slots than this are running.
        per_block: when no block has more running slots than this.
        blocks: when no more blocks than this have a running slot.
    """

    step: chex.Array
    running: chex.Array
    per_block: chex.Array
    blocks: chex.Array


def lay_out(model: Transformer, params: Any) -> dict[str, Any]:
    """Lays parameters out for decoding: layer by layer, matrices that read the same activations in one, in the model's dtype.

    Queries, keys and values lie together by key head, so that a mesh that splits the heads splits the fused matrix without any exchange.

    Args:
        model: the transformer.
        params: of `families.parameter_shapes`.

    Returns:
        {"layers": one mapping for each layer, as `layers.layer` reads it, and the other parameters as they are}.
    """
    made = tuple(_lay_out_layer(model, params["layers"], np.int32(row)) for row in range(model.config.num_layers))
    matrices = {name: params[name].astype(model.dtype) for name in ("embedding", "head") if name in params}
    return {"layers": made, "final_norm": params["final_norm"], **matrices}


@functools.partial(jax.jit, static_argnums=0)
def _lay_out_layer(model: Transformer, stacked: Any, row: chex.Array) -> dict[str, chex.Array]:
    """One layer of `lay_out`."""
    w = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, row, axis=0, keepdims=False), stacked)
    query = w["query"].reshape(w["query"].shape[0], model.config.num_kv_heads, -1, model.config.head_dim)
    fused = {
        "query_key_value": jnp.concatenate([query, w["key"][:, :, None], w["value"][:, :, None]], axis=2),
        "gate_up": jnp.stack([w["gate"], w["up"]], axis=1), "output": w["output"], "down": w["down"],
    }  # fmt: skip
    return {name: x.astype(model.dtype) for name, x in fused.items()} | {name: w[name] for name in ("attention_norm", "mlp_norm")}


@functools.partial(jax.jit, static_argnums=0)
def prefill(model: Transformer, weights: Any, prompts: chex.Array) -> Caches:
    """Computes prompts [P, Tp] int32, padded on the right, once for all their completions; `weights` are those of `lay_out`."""
    c = model.config
    columns = jnp.arange(prompts.shape[1], dtype=jnp.int32)[None, :]
    angles = layers.rotation(jnp.broadcast_to(columns, prompts.shape), c, model.dtype)
    x, caches = jnp.take(weights["embedding"], prompts, axis=0), []
    for layer in weights["layers"]:
        x, kept = layers.layer(c, layer, x, angles, layers.attention_over([]))
        caches.append(kept)
    return tuple(caches)


@jax.jit
def gather_prompts(prefilled: Caches, table: chex.Array) -> Caches:
    """Lays the prompts that each block holds next to each other.

    Args:
        prefilled: of P prompts of Tp tokens.
        table: [blocks, places] int32, the prompt at each place.

    Returns:
        Caches of `blocks` rows and places * Tp tokens.
    """

    def gathered(keys: chex.Array, values: chex.Array) -> tuple[chex.Array, chex.Array]:
        keys, values = jnp.take(keys, table, axis=0), jnp.take(values, table, axis=0)
        blocks, places, heads, size, length = keys.shape
        keys = keys.transpose(0, 2, 3, 1, 4).reshape(blocks, heads, size, places * length)
        return keys, values.swapaxes(1, 2).reshape(blocks, heads, places * length, size)

    return tuple(gathered(*kept) for kept in prefilled)


@functools.partial(jax.jit, donate_argnums=0)
def put_prompt(prefix: Caches, prefilled: Caches, block: chex.Array, place: chex.Array, prompt: chex.Array) -> Caches:
    """Returns `prefix`, of `gather_prompts`, with another prompt at a block's place; the three are int32 scalars."""

    def put(held: tuple[chex.Array, chex.Array], kept: tuple[chex.Array, chex.Array]) -> tuple[chex.Array, ...]:
        start = place * kept[0].shape[-1]
        new = [jax.lax.dynamic_slice_in_dim(x, prompt, 1, axis=0) for x in kept]
        keys = jax.lax.dynamic_update_slice(held[0], new[0], (block, 0, 0, start))
        return keys, jax.lax.dynamic_update_slice(held[1], new[1], (block, 0, start, 0))

    return tuple(put(*pair) for pair in zip(prefix, prefilled, strict=True))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def empty_caches(model: Transformer, rows: int, width: int) -> Caches:
    """Returns room for `width` tokens of each of `rows` slots."""
    c = model.config
    keys, values = [(rows, c.num_kv_heads, *shape) for shape in ((c.head_dim, width), (width, c.head_dim))]
    return tuple((jnp.zeros(keys, model.dtype), jnp.zeros(values, model.dtype)) for _ in range(c.num_layers))


@functools.partial(jax.jit, static_argnums=1)
def widen(caches: Caches, width: int) -> Caches:
    """Returns the caches with room for `width` tokens."""

    def padded(x: chex.Array, axis: int) -> chex.Array:
        return jnp.pad(x, [(0, width - size if place == axis else 0) for place, size in enumerate(x.shape)])

    return tuple((padded(keys, 3), padded(values, 2)) for keys, values in caches)


@jax.jit
def take_rows(tree: Any, rows: chex.Array) -> Any:
    """Returns some rows of arrays [B, ...]: those of `rows` int32, in that order."""
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), tree)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(5, 7))
def decode(
    model: Transformer, settings: Any, places: int, weights: Any, prefix: Caches, caches: Caches, slots: SlotState, drawn: Drawn,
    key: chex.PRNGKey, step: chex.Array, until: Until,
) -> tuple[Caches, SlotState, Drawn, chex.Array]:
    """Draws tokens, step after step, until the host has something to do.

    Args:
        model: the transformer.
        settings: `engine.GenerationSettings`.
        places: prompts that each block holds.
        weights: of `lay_out`.
        prefix: the prompts of the blocks, rows B / rows per block.
        caches: the ring, `width` columns; narrower than `drawn` as long as no step was greater.
        slots: what the slots work on.
        drawn: what they have drawn, size = max_new_tokens columns.
        key: names the random stream; token i of completion n is drawn with fold_in(fold_in(key, n), i).
        step: int32 scalar, steps since the rings were empty.
        until: when to come back.

    Returns:
        (caches, slots, drawn, step), the first and the third in the memory of those that were given.
    """  # fmt: skip
    chex.assert_equal_shape([*jax.tree.leaves(slots)])
    width, size = caches[0][0].shape[-1], drawn.tokens.shape[1]
    blocks, held = prefix[0][0].shape[0], prefix[0][0].shape[-1]
    length = held // places
    columns, in_block = jnp.arange(width, dtype=jnp.int32)[None, :], jnp.arange(held, dtype=jnp.int32)[None, :]
    of_prompt = (in_block // length == slots.places[:, None]) & (in_block % length < slots.prompt_lengths[:, None] - 1)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, slots.completions.astype(jnp.uint32))
    # Of all positions, before the loop: inside it the compiler would compute a cosine anew wherever one is used.
    angles = layers.rotation(jnp.arange(length + size, dtype=jnp.int32)[:, None], model.config, model.dtype)

    def one(carry: Any) -> Any:
        caches, slots, drawn, step = carry
        column, own = step % size, (step - columns) % size <= slots.ages[:, None]
        logits, caches = _forward(model, weights, prefix, caches, slots, take_rows(angles, slots.positions), of_prompt, own, column)
        uniforms = jax.vmap(lambda k, i: jax.random.uniform(jax.random.fold_in(k, i), dtype=logits.dtype))(keys, slots.ages)
        tokens, log_probs = sampler.sample(logits, uniforms, settings.support)
        running = slots.running
        drawn = Drawn(
            tokens=_write(drawn.tokens, tokens, running, column), log_probs=_write(drawn.log_probs, log_probs.astype(jnp.float32), running, column)
        )
        stopped = functools.reduce(jnp.logical_or, [tokens == s for s in settings.stop_ids], jnp.zeros_like(running))
        ages = slots.ages + running.astype(jnp.int32)
        slots = slots.replace(
            inputs=jnp.where(running, tokens, settings.pad_id),
            positions=slots.positions + running.astype(jnp.int32),
            ages=ages,
            running=running & ~stopped & (ages < slots.limits),
        )
        return caches, slots, drawn, step + 1

    def unfinished(carry: Any) -> chex.Array:
        _, slots, _, step = carry
        by_block = jnp.sum(slots.running.reshape(blocks, -1), axis=1)
        busy = (jnp.sum(by_block) > until.running) & (jnp.max(by_block) > until.per_block) & (jnp.sum(by_block > 0) > until.blocks)
        return busy & (step < until.step)

    return jax.lax.while_loop(unfinished, one, (caches, slots, drawn, step))


def _forward(model, weights, prefix, caches, slots, angles, of_prompt, own, column):
    """Returns (logits [B, V] of one step, caches with its keys and values)."""
    x, kept = jnp.take(weights["embedding"], slots.inputs[:, None], axis=0), []
    for layer, (cached_keys, cached_values), shared in zip(weights["layers"], caches, prefix, strict=True):

        def attention(query, keys, values, cached_keys=cached_keys, cached_values=cached_values, shared=shared):
            # Written first and read after: a cache that is read and then written would be copied.
            keys = jax.lax.dynamic_update_slice_in_dim(cached_keys, keys, column, axis=3)
            values = jax.lax.dynamic_update_slice_in_dim(cached_values, values, column, axis=2)
            return layers.attend(query, [(*shared, of_prompt[:, None]), (keys, values, own[:, None])]), (keys, values)

        x, both = layers.layer(model.config, layer, x, angles, attention)
        kept.append(both)
    hidden = layers.rms_norm(x, weights["final_norm"], epsilon=model.config.norm_epsilon)
    return transformer.logits(weights, hidden)[:, 0], tuple(kept)


def _write(ring: chex.Array, values: chex.Array, running: chex.Array, column: chex.Array) -> chex.Array:
    """Puts one value a row into a column; a slot that has ended keeps what it drew until the host has fetched it."""
    before = jax.lax.dynamic_slice_in_dim(ring, column, 1, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(ring, jnp.where(running[:, None], values[:, None], before), column, axis=1)
