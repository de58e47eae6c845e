"""Ragged data compiles nothing new: after the first step of each prompt bucket, completion width and number of packed rows, and the first that measures
gradients there, no program is."""

import dataclasses

import jax
import learner_cases as cases
import numpy as np
import pytest

from pgrpo_jax import batching
from pgrpo_jax.kl_control import KLControl

BUCKETS, STEPS, UNIT = (6, 8), 50, cases.P // 2  # padded prompt lengths, tokens; updates; prompts in a unit
MOST = 40  # tokens of a completion at most: batches are 32 or 40 wide
COMPILED = "/jax/core/compile/backend_compile_duration"


pytestmark = pytest.mark.usefixtures("lenient")


@pytest.fixture
def compiled():
    """Names of the programs compiled so far, as JAX tells them."""
    names = []

    def note(event, duration, **details):
        if event == COMPILED:
            names.append(details.get("fun_name", "?"))

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


def ragged(index: int, step: int, width: int, longest: int):
    """A unit whose prompts are padded to `width`, with completions of 0 to `longest` of `MOST` tokens; prompts miss some of theirs, or all."""
    whole, rng = cases.rollouts(index, version=step, prompts=UNIT, step=step), cases.named(f"ragged {index}")
    kept = np.flatnonzero(rng.random(len(whole.rewards)) < 0.7)
    kept = kept if len(kept) else np.arange(1)
    rows = {
        name: getattr(whole, name)[kept]
        for name in ("completions", "completion_lengths", "prompt_index", "behaviour_log_probs", "truncated", "rewards")
    }
    lengths = rng.integers(0, longest + 1, len(kept)).astype(np.int32)
    lengths[0] = longest
    for name in ("completions", "behaviour_log_probs"):
        rows[name] = np.pad(rows[name], ((0, 0), (0, MOST - cases.TC)), mode="wrap")
    return dataclasses.replace(
        whole,
        **(rows | {"completion_lengths": lengths}),
        prompts=np.pad(whole.prompts, ((0, 0), (0, width - cases.TP)), constant_values=cases.PAD),
        prompt_lengths=rng.integers(1, width + 1, UNIT).astype(np.int32),
        texts=tuple(whole.texts[row] for row in kept),
        reward_components={name: values[kept] for name, values in whole.reward_components.items()},
    )


def shapes(units, *, packed: bool):
    """What the model computes: the width of completions, and the rows of a prompt where they are packed."""
    batch = batching.to_train_batch(units, completions_per_prompt=cases.G, pad_id=cases.PAD)
    rows = batching.pack(batch).packing if packed else None
    return batch.completions.shape[1], None if rows is None else rows.shape[1]


@pytest.mark.parametrize(
    "options",
    [
        {"longest": (cases.TC, 33), "packing": True, "micro_batch_tokens": 400},
        {"longest": (cases.TC,), "kl": KLControl(coefficient=0.1), "micro_batches": 2, "passes_per_batch": 2, "gradients_every": 10, "num_devices": 2},
    ],
    ids=["packed", "everything"],
)
def test_fifty_ragged_steps_compile_no_more_than_their_first(options, compiled, tmp_path):
    options, reference = dict(options), cases.params("reference") if "kl" in options else None
    longest = options.pop("longest")
    learner = cases.learner(tmp_path, num_steps=STEPS, reference=reference, **options)
    seen, grown = set(), []
    try:
        for step in range(STEPS):
            rng = cases.named(f"widths {step}")
            widths = [int(rng.choice(BUCKETS)) for _ in range(2)] if step > 1 else [BUCKETS[step]] * 2
            most, before = int(rng.choice(longest)), len(compiled)
            units = [ragged(2 * step + i, step, width, most) for i, width in enumerate(widths)]
            learner.update(units)
            kind = max(widths), shapes(units, packed="packing" in options), "gradients_every" in options and learner.step % options["gradients_every"] == 0
            if kind in seen and len(compiled) > before:
                grown.append((step, widths, compiled[before:]))
            seen.add(kind)
        kinds = len(BUCKETS) * len(longest) * (2 if "gradients_every" in options else 1)
        kinds += len(BUCKETS) if "packing" in options else 0  # of the wide ones some can be packed
        assert len(seen) == kinds and compiled, "all were trained on, and what compiles is seen"
        assert grown == []
    finally:
        learner.close()
