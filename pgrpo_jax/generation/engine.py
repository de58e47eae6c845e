"""Generation: each prompt is computed once for all its completions, slots that have ended are refilled, many steps run in one program.

What all prompts begin with is computed once for all of them. The device's side is decoding.py, the host's slots.py; here they meet.
"""

import dataclasses
from typing import Any, Sequence

import chex
import jax
import numpy as np
from jax.sharding import NamedSharding

from pgrpo_jax.buckets import bucket_length, completion_widths, shared_columns
from pgrpo_jax.generation import decoding, kv_cache, sampler
from pgrpo_jax.generation.slots import Slots
from pgrpo_jax.models.transformer import laid_over, Transformer

_REFILL_SHARE = 32  # the host is asked for new work when one slot in so many has ended


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """What is generated.

    Attributes:
        max_new_tokens: Tc, tokens, stop token included.
        support: the sampling distribution.
        stop_ids: token ids that end a completion.
        pad_id: fills what lies behind the end.
        prompt_buckets: ascending padded prompt lengths, tokens; one compilation each.
        slots: completions decoded at the same time; 0 = all of a call.
        weights: how matrices are stored meanwhile, one of `quantised.STORAGE`.
        cache: how keys and values are stored.
        smallest_batch: slots down to which the batch is halved when no work is left for them; one of fewer takes hardly less time.
    """

    max_new_tokens: int
    support: sampler.Support
    stop_ids: tuple[int, ...]
    pad_id: int
    prompt_buckets: tuple[int, ...]
    slots: int = 0
    weights: str = "model"
    cache: str = "model"
    smallest_batch: int = 16


@dataclasses.dataclass(frozen=True)
class Completions:
    """N = P * G completions, the G of a prompt next to each other; arrays as in `structs.Rollouts`.

    Attributes:
        tokens: [N, Tc] int32.
        lengths: [N] int32, tokens, stop token included.
        log_probs: [N, Tc] float32 of the sampled tokens; 0 on padding.
        truncated: [N] bool, True where no stop token was drawn.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray
    truncated: np.ndarray


def pad_prompts(prompts: Sequence[Sequence[int]], *, buckets: Sequence[int], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads token lists on the right to one bucket.

    Returns:
        (prompts [P, Tp] int32, lengths [P] int32).

    Raises:
        ValueError: a prompt is empty or longer than the largest bucket.
    """
    lengths = np.array([len(p) for p in prompts], np.int32)
    if lengths.min(initial=1) < 1:
        raise ValueError(f"prompt {int(lengths.argmin())} has 0 tokens, at least 1 is needed to predict a next one: leave the prompt out")
    padded = np.full((len(prompts), bucket_length(int(lengths.max(initial=1)), buckets)), pad_id, np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return padded, lengths


def generate(
    model: Transformer,
    params: Any,
    prompts: np.ndarray,
    lengths: np.ndarray,
    key: chex.PRNGKey,
    *,
    completions_per_prompt: int,
    settings: GenerationSettings,
    limits: np.ndarray | None = None,
    adapters: np.ndarray | None = None,
) -> Completions:
    """Samples completions. A pure function of its arguments: same key, same completions, to the bit.

    Args:
        model: the transformer.
        params: its parameters.
        prompts: [P, Tp] int32, padded on the right to a bucket.
        lengths: [P] int32, tokens.
        key: names the random stream; completion n draws from fold_in(key, n).
        completions_per_prompt: G.
        settings: what is generated.
        limits: [N] int32 in [1, Tc], tokens after which each completion is cut; None: Tc for all.
        adapters: [P] int32, which of the model's adapters each prompt is answered with; None: the first, or the model has none.

    Returns:
        Completions on the host.

    Raises:
        FloatingPointError: a log-prob is not finite, so the parameters are not.
        ValueError: a limit or an adapter is out of bounds.
    """
    chex.assert_rank([prompts, lengths], [2, 1])
    shape = (len(prompts), completions_per_prompt)
    limits = np.full(shape, settings.max_new_tokens, np.int32) if limits is None else np.asarray(limits, np.int32).reshape(shape)
    if limits.min() < 1 or limits.max() > settings.max_new_tokens:
        raise ValueError(
            f"limits reach from {limits.min()} to {limits.max()} tokens, outside [1, max_new_tokens = {settings.max_new_tokens}]: clip them"
        )
    adapters = np.zeros(len(prompts), np.int32) if adapters is None else np.asarray(adapters, np.int32)
    _check_adapters(model, adapters, len(prompts))
    run = _Run(model, params, prompts, lengths, key, limits, adapters, settings)
    while run.advance():
        pass
    out = run.completions
    if (bad := np.flatnonzero(~np.isfinite(out.log_probs).all(axis=1))).size:
        raise FloatingPointError(f"log-probs of completion {bad[0]} are not finite: the weights are damaged, go back to a good checkpoint")
    return out


def _check_adapters(model: Transformer, adapters: np.ndarray, num_prompts: int) -> None:
    known = 1 if model.config.lora is None else model.config.lora.num_adapters
    if adapters.shape != (num_prompts,) or adapters.min() < 0 or adapters.max() >= known:
        raise ValueError(f"adapters {adapters.tolist()} must be one for each of {num_prompts} prompts, in [0, {known}): the model has {known}")


def arrange(num_prompts: int, completions_per_prompt: int, slots: int, *, short: bool) -> dict[str, int]:
    """Returns how many blocks there are, of how many rows, and how many prompts each holds.

    With a slot for every completion a block answers one prompt to its end. With fewer and `short` prompts, whose caches are read sooner than
    those of completions, each slot is a block of its own and takes whichever completion comes next. Otherwise a block's slots share two
    prompts, so that the next one's completions begin while the last of the one before are still under way.
    """
    if slots == 0 or slots >= num_prompts * completions_per_prompt:
        return {"blocks": num_prompts, "rows_per_block": completions_per_prompt, "places": 1}
    if short:
        return {"blocks": slots, "rows_per_block": 1, "places": 1}
    rows_per_block = min(completions_per_prompt, slots)
    return {"blocks": max(1, slots // rows_per_block), "rows_per_block": rows_per_block, "places": 2}


class _Run:
    """One call of `generate`: the host decides, the device decodes in between."""

    def __init__(self, model, params, prompts, lengths, key, limits, adapters, settings):
        lies = getattr(params["final_norm"], "sharding", None)
        model = laid_over(model, lies.mesh if isinstance(lies, NamedSharding) else None)
        self._model, self._settings, self._key = model, settings, key
        # What an adapter makes of the same beginning is another's no more.
        begun = shared_columns(prompts, lengths) if (adapters == adapters[0]).all() else 0
        self._arrangement = arrange(*limits.shape, settings.slots, short=prompts.shape[1] - begun <= settings.max_new_tokens)
        last = np.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0]
        self._slots = Slots(lengths, last, limits, adapters, **self._arrangement, smallest=settings.smallest_batch)
        size, rows = settings.max_new_tokens, len(self._slots.began)
        self._widths = completion_widths(size)
        self._width, self._step, self._origin = self._widths[0], 0, 0
        self._weights = decoding.lay_out(model, params, settings.weights)
        self._beginning = decoding.prefill(model, settings.cache, self._weights, prompts[:1, :begun], adapters[:1]) if begun else ()
        self._prefilled = decoding.prefill(model, settings.cache, self._weights, prompts[:, begun:], adapters, self._beginning)
        self._slots.refill(0)
        self._prefix = kv_cache.gather_prompts(self._prefilled, np.maximum(self._slots.table, 0))
        self._caches = kv_cache.empty(model, settings.cache, rows, self._width)
        self._drawn = decoding.Drawn(tokens=np.zeros((rows, size), np.int32), log_probs=np.zeros((rows, size), np.float32))
        count = limits.size
        self.completions = Completions(
            tokens=np.full((count, size), settings.pad_id, np.int32),
            lengths=np.zeros(count, np.int32),
            log_probs=np.zeros((count, size), np.float32),
            truncated=np.zeros(count, bool),
        )

    def advance(self) -> bool:
        """Decodes until something is to be decided, and decides it; returns whether anything is still running."""
        slots, running = self._slots, self._slots.state.running
        per_block, blocks = slots.smaller()
        last = self._step + self._width - slots.oldest()
        fewest = running.sum() - max(1, len(running) // _REFILL_SHARE) if slots.waiting else 0
        until = decoding.Until(**{
            name: np.int32(value) for name, value in {"step": last, "running": fewest, "per_block": per_block, "blocks": blocks}.items()
        })  # fmt: skip
        self._caches, state, self._drawn, step = decoding.decode(
            self._model, self._settings, self._arrangement["places"], self._weights, self._beginning, self._prefix, self._caches,
            slots.state, self._drawn, self._key, np.int32(self._step), np.int32(self._origin), until,
        )  # fmt: skip
        state, drawn, step = jax.device_get((state, self._drawn, step))
        self._step = int(step)
        for row in np.flatnonzero(running & ~state.running):
            self._finish(row, state, drawn)
        slots.state = jax.tree.map(np.array, state)
        self._rearrange()
        return bool(slots.state.running.any())

    def _finish(self, row: int, state: decoding.SlotState, drawn: decoding.Drawn) -> None:
        """Writes down the completion of a slot that has ended."""
        out, n, length = self.completions, state.completions[row], state.ages[row]
        columns = (self._slots.began[row] + np.arange(length)) % self._settings.max_new_tokens
        out.tokens[n, :length], out.log_probs[n, :length] = drawn.tokens[row, columns], drawn.log_probs[row, columns]
        out.lengths[n] = length
        out.truncated[n] = out.tokens[n, length - 1] not in self._settings.stop_ids

    def _rearrange(self) -> None:
        """Gives ended slots new work, or makes the batch smaller; makes the caches wider when they are full."""
        slots = self._slots
        for block, place, prompt in slots.refill(self._step):
            self._prefix = kv_cache.put_prompt(self._prefix, self._prefilled, *map(np.int32, (block, place, prompt)))
        while slots.state.running.any() and (kept := slots.shrink()) is not None:
            rows, blocks = kept
            self._caches, self._drawn = kv_cache.take_rows((self._caches, self._drawn), rows)
            if len(blocks) < kv_cache.extent(self._prefix)[0]:
                self._prefix = kv_cache.take_rows(self._prefix, blocks)
        self._resize()

    def _resize(self) -> None:
        """Makes the caches wider when the oldest completion fills them, and narrower when all that are under way are young."""
        age, before = self._slots.oldest(), self._width
        if age == before:
            self._width = next(width for width in self._widths if width > age)
        elif self._slots.waiting:
            enough = next(width for width in self._widths if width >= min(age + self._widths[0] // 2, before))
            self._width = enough if enough <= before // 2 else before
        if self._width != before:
            first = self._step - age
            self._caches = kv_cache.resize(self._caches, self._width, np.int32((first - self._origin) % before))
            self._origin = first
