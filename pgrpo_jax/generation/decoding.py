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

from pgrpo_jax.generation import kv_cache, sampler
from pgrpo_jax.generation.kv_cache import Caches
from pgrpo_jax.models import attention, layers, lora, quantised, transformer
from pgrpo_jax.models.quantised import Stored
from pgrpo_jax.models.transformer import Transformer

_TABLES = {"embedding": 1, "head": 0}  # axis of a token's vector


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
        adapters: int32, which of the model's adapters that prompt is answered with.
    """

    completions: chex.Array
    inputs: chex.Array
    positions: chex.Array
    ages: chex.Array
    limits: chex.Array
    running: chex.Array
    places: chex.Array
    prompt_lengths: chex.Array
    adapters: chex.Array


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


def lay_out(model: Transformer, params: Any, storage: str = "model") -> dict[str, Any]:
    """Lays parameters out for decoding: layer by layer, matrices that read the same activations in one, in the model's dtype or in less room.

    Queries, keys and values lie together by key head, so that a mesh that splits the heads splits the fused matrix without any exchange.

    Args:
        model: the transformer.
        params: of `parameters.parameter_shapes`.
        storage: of `quantised.STORAGE`, of the matrices; with int8 each output has a scale.

    Returns:
        {"layers": one mapping for each layer, as `layers.layer` reads it, and the other parameters as they are}.
    """
    made = tuple(_lay_out_layer(model, storage, params["layers"], np.int32(row)) for row in range(model.config.num_layers))
    matrices = {name: quantised.store(params[name].astype(model.dtype), storage, axis=axis) for name, axis in _TABLES.items() if name in params}
    return {"layers": made, "final_norm": params["final_norm"], **matrices}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _lay_out_layer(model: Transformer, storage: str, stacked: Any, row: chex.Array) -> dict[str, Stored]:
    """One layer of `lay_out`."""
    w = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, row, axis=0, keepdims=False), stacked)
    query = w["query"].reshape(w["query"].shape[0], model.config.num_kv_heads, -1, model.config.head_dim)
    fused = {
        "query_key_value": jnp.concatenate([query, w["key"][:, :, None], w["value"][:, :, None]], axis=2),
        "output": w["output"].reshape(-1, model.config.width),
    }
    prefix, inputs = ("expert_", 1) if model.config.num_experts else ("", 0)
    mlp = {"gate_up": jnp.stack([w[f"{prefix}gate"], w[f"{prefix}up"]], axis=inputs + 1), "down": w[f"{prefix}down"]}
    stored = {name: quantised.store(x.astype(model.dtype), storage, axis=0) for name, x in fused.items()}
    stored |= {f"{prefix}{name}": quantised.store(x.astype(model.dtype), storage, axis=inputs) for name, x in mlp.items()}
    if model.config.qkv_bias:
        query = w["query_bias"].reshape(model.config.num_kv_heads, -1, model.config.head_dim)
        stored["query_key_value_bias"] = jnp.concatenate([query, w["key_bias"][:, None], w["value_bias"][:, None]], axis=1)
    # Adapters stay beside what they change: in fewer bits it would swallow them.
    adapters = {name: x.astype(model.dtype) for name, x in w.items() if lora.is_adapter(name)}
    return stored | adapters | {name: x for name, x in w.items() if "norm" in name or name == "router"}


@functools.partial(jax.jit, static_argnums=(0, 1))
def prefill(model: Transformer, storage: str, weights: Any, prompts: chex.Array, adapters: chex.Array, beginning: Caches = ()) -> Caches:
    """Computes prompts once for all their completions.

    Args:
        model: the transformer.
        storage: of `quantised.STORAGE`, of the caches.
        weights: of `lay_out`.
        prompts: [P, Tp] int32, padded on the right.
        adapters: [P] int32, which of the model's adapters each prompt is answered with.
        beginning: of the tokens that all of them begin with and that are not among `prompts`, one row; () = none.

    Returns:
        Caches of P rows and Tp tokens.
    """
    c, begun = model.config, kv_cache.extent(beginning)[1]
    positions = jnp.broadcast_to(begun + jnp.arange(prompts.shape[1], dtype=jnp.int32)[None, :], prompts.shape)
    angles = {local: layers.rotation(positions, c, model.dtype, local=local) for local in (False, True)}
    whole, at = jnp.ones((1, 1, begun), bool), jnp.arange(begun, dtype=jnp.int32)[None, :]
    x, caches = transformer.embed(c, quantised.take(weights["embedding"], prompts, model.dtype)), []
    for row, layer in enumerate(weights["layers"]):
        window = c.window(row)
        parts = [(*beginning[row], whole, at)] if beginning else []
        attended = attention.attention_over(c, parts, positions, window=window or None, mesh=model.mesh)
        x, kept = layers.layer(c, layer, x, angles[window > 0], attended, adapters=adapters, mesh=model.mesh)
        caches.append(kv_cache.keep(*kept, storage))
    return tuple(caches)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(6, 8))
def decode(
    model: Transformer, settings: Any, places: int, weights: Any, beginning: Caches, prefix: Caches, caches: Caches, slots: SlotState, drawn: Drawn,
    key: chex.PRNGKey, step: chex.Array, origin: chex.Array, until: Until,
) -> tuple[Caches, SlotState, Drawn, chex.Array]:
    """Draws tokens, step after step, until the host has something to do.

    Args:
        model: the transformer.
        settings: `engine.GenerationSettings`.
        places: prompts that each block holds.
        weights: of `lay_out`.
        beginning: of the tokens that all prompts begin with, one row; () = none.
        prefix: what follows them in the prompts of the blocks, rows B / rows per block.
        caches: the ring, `width` columns: step s writes column (s - origin) mod width. No running slot may become older than `width` tokens.
        slots: what the slots work on.
        drawn: what they have drawn, size = max_new_tokens columns.
        key: names the random stream; token i of completion n is drawn with fold_in(fold_in(key, n), i).
        step: int32 scalar, steps since the first.
        origin: int32 scalar, the step that wrote, or would have written, the ring's column 0.
        until: when to come back.

    Returns:
        (caches, slots, drawn, step), the first and the third in the memory of those that were given.
    """  # fmt: skip
    chex.assert_equal_shape([*jax.tree.leaves(slots)])
    (_, width), (blocks, held), size = kv_cache.extent(caches), kv_cache.extent(prefix), drawn.tokens.shape[1]
    length, begun = held // places, kv_cache.extent(beginning)[1]
    columns, in_block = jnp.arange(width, dtype=jnp.int32)[None, :], jnp.arange(held, dtype=jnp.int32)[None, :]
    of_prompt = (in_block // length == slots.places[:, None]) & (in_block % length < slots.prompt_lengths[:, None] - 1 - begun)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, slots.completions.astype(jnp.uint32))
    # Of all positions, before the loop: inside it the compiler would compute a cosine anew wherever one is used.
    every = jnp.arange(begun + length + size, dtype=jnp.int32)[:, None]
    angles = {local: layers.rotation(every, model.config, model.dtype, local=local) for local in (False, True)}

    def one(carry: Any) -> Any:
        caches, slots, drawn, step = carry
        column, place = (step - origin) % width, step % size
        past = (column - columns) % width  # tokens since a column was written
        own, at = past <= slots.ages[:, None], kv_cache.take_rows(angles, slots.positions)
        masks = _masks(model.config, slots.positions[:, None], (begun, of_prompt, begun + in_block % length), (own, past))
        logits, caches = _forward(model, settings.cache, weights, beginning, prefix, caches, slots, at, masks, column)
        uniforms = jax.vmap(lambda k, i: jax.random.uniform(jax.random.fold_in(k, i), dtype=logits.dtype))(keys, slots.ages)
        tokens, log_probs = sampler.sample(logits, uniforms, settings.support)
        running = slots.running
        drawn = Drawn(
            tokens=_write(drawn.tokens, tokens, running, place), log_probs=_write(drawn.log_probs, log_probs.astype(jnp.float32), running, place)
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


def _masks(config, positions, prompts, ring):
    """Window -> masks [B or 1, S] of the beginning, of the blocks' prompts and of the slots' own tokens, without what lies further back; 0 = no window."""
    (begun, of_prompt, places), (own, past) = prompts, ring
    places_of_beginning, of_beginning = jnp.arange(begun, dtype=jnp.int32)[None, :], jnp.ones((1, begun), bool)
    masks = {0: (of_beginning, of_prompt, own)}
    for window in {*config.windows} - {0}:
        first = positions - window  # the last token that is too far away
        masks[window] = (places_of_beginning > first, of_prompt & (places > first), own & (past < window))
    return masks


def _forward(model, storage, weights, beginning, prefix, caches, slots, angles, masks, column):
    """Returns (logits [B, V] of one step, caches with its keys and values)."""
    c, kept = model.config, []
    x = transformer.embed(c, quantised.take(weights["embedding"], slots.inputs[:, None], model.dtype))
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=column)
    for row, layer in enumerate(weights["layers"]):
        of_beginning, of_prompt, own = masks[c.window(row)]

        def attended(query, keys, values, row=row, of_beginning=of_beginning, of_prompt=of_prompt, own=own):
            # Written first and read after: a cache that is read and then written would be copied.
            (both,) = kv_cache.by_column(write, (caches[row],), (kv_cache.keep(keys, values, storage),))
            parts = [(*beginning[row], of_beginning[:, None])] if beginning else []
            parts += [(*prefix[row], of_prompt[:, None]), (*both, own[:, None])]
            return attention.attend(query, parts, **attention.constants(c)), both

        x, both = layers.layer(c, layer, x, angles[c.window(row) > 0], attended, adapters=slots.adapters, mesh=model.mesh)
        kept.append(both)
    hidden = layers.rms_norm(x, weights["final_norm"], epsilon=c.norm_epsilon, offset=c.norm_offset)
    return transformer.logits(weights, hidden, c.logit_soft_cap)[:, 0], tuple(kept)


def _write(ring: chex.Array, values: chex.Array, running: chex.Array, column: chex.Array) -> chex.Array:
    """Puts one value a row into a column; a slot that has ended keeps what it drew until the host has fetched it."""
    before = jax.lax.dynamic_slice_in_dim(ring, column, 1, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(ring, jnp.where(running[:, None], values[:, None], before), column, axis=1)
