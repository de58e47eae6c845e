"""The actor: a rollout is a pure function of (weights, work), and its fields agree with one another."""

import dataclasses
import zlib

import jax
import numpy as np
import pytest

from pgrpo_jax.actor import Actor
from pgrpo_jax.generation import engine
from pgrpo_jax.generation.sampler import Support
from pgrpo_jax.models import families, transformer
from pgrpo_jax.models.tokenizer import ByteTokenizer
from pgrpo_jax.structs import Work
from pgrpo_jax.tasks import letters

CONFIG = families.ModelConfig(
    num_layers=1, width=8, mlp_width=8, num_heads=2, num_kv_heads=1, head_dim=4, vocab_size=259, context_length=64, rope_theta=100.0,
    norm_epsilon=1e-5, tied_embeddings=True,
)  # fmt: skip
# the padding is a letter: one that slipped into an answer would be seen
SETTINGS = engine.GenerationSettings(
    max_new_tokens=8, support=Support(temperature=0.8), stop_ids=(257, *range(33, 60)), pad_id=120, prompt_buckets=(16, 40)
)
ACTOR = Actor(
    model=transformer.Transformer(CONFIG),
    tokenizer=ByteTokenizer(),
    task=letters.load("", seed=0, num_preference_groups=3),
    settings=SETTINGS,
    prompts_per_work=3,
    completions_per_prompt=4,
    seed=7,
)
WORK = Work(index=5, step=2, version=1)


def draw_weights(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda spec: rng.normal(0, 0.5, spec.shape).astype(np.float32), families.parameter_shapes(CONFIG))


def content(rollouts):
    """Every field but the time it took and the work's own name, as comparable bytes."""
    fields = {f.name: getattr(rollouts, f.name) for f in dataclasses.fields(rollouts) if f.name not in ("generation_secs", "work")}
    fields |= fields.pop("reward_components")
    return {name: (value.dtype, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value for name, value in fields.items()}


def test_the_same_work_gives_the_same_bits():
    first = ACTOR.rollout(draw_weights(), WORK)
    # another actor with the same settings, asked for other work in between, as after a restart
    twin = dataclasses.replace(ACTOR, tokenizer=ByteTokenizer(), task=letters.load("", seed=0, num_preference_groups=3))
    twin.rollout(draw_weights(), Work(index=0, step=0, version=0))
    assert content(twin.rollout(draw_weights(), WORK)) == content(first)
    # who is to consume it, and when, decides nothing
    assert content(ACTOR.rollout(draw_weights(), Work(index=5, step=4, version=3))) == content(first)


@pytest.mark.parametrize(
    "changes, weights_seed, work, same_prompts",
    [
        ({}, 0, Work(index=6, step=2, version=1), False),
        ({}, 0, Work(index=5, step=2, version=1, split="test"), False),
        ({"seed": 8}, 0, WORK, True),
        ({}, 1, WORK, True),
    ],
    ids=["index", "split", "seed", "weights"],
)
def test_another_name_is_another_stream(changes, weights_seed, work, same_prompts):
    first = ACTOR.rollout(draw_weights(), WORK)
    other = dataclasses.replace(ACTOR, **changes).rollout(draw_weights(weights_seed), work)
    assert (first.prompt_records == other.prompt_records) == same_prompts
    assert not np.array_equal(first.completions, other.completions)


@pytest.mark.parametrize("split", ["train", "test"])
def test_completions_are_drawn_from_the_stream_that_seed_split_and_index_name(split):
    rollouts = ACTOR.rollout(draw_weights(), Work(index=5, step=0, version=0, split=split))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), zlib.crc32(f"rollouts/{split}".encode())), 5)
    again = engine.generate(
        ACTOR.model, draw_weights(), rollouts.prompts, rollouts.prompt_lengths, key, completions_per_prompt=4, settings=SETTINGS
    )
    np.testing.assert_array_equal(rollouts.completions, again.tokens)
    np.testing.assert_array_equal(rollouts.behaviour_log_probs, again.log_probs)


def test_fields_agree():
    work = Work(index=1, step=3, version=2)
    r, tokenizer = ACTOR.rollout(draw_weights(), work), ByteTokenizer()
    assert r.work == work and r.prompt_records == ACTOR.task.prompts("train", 1, 3) and r.generation_secs > 0
    for record, row, length in zip(r.prompt_records, r.prompts, r.prompt_lengths, strict=True):
        assert row[:length].tolist() == tokenizer.render_chat(record.text) and np.all(row[length:] == 120)
    assert r.prompts.shape == (3, 40) or r.prompts.shape == (3, 16)
    np.testing.assert_array_equal(r.prompt_index, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    assert r.completions.shape == r.behaviour_log_probs.shape == (12, 8)
    behind = np.arange(8)[None, :] >= r.completion_lengths[:, None]
    assert np.all(r.completions[behind] == 120)
    assert np.all(r.behaviour_log_probs[behind] == 0) and np.all(r.behaviour_log_probs[~behind] < 0)
    last = r.completions[np.arange(12), r.completion_lengths - 1]
    np.testing.assert_array_equal(r.truncated, ~np.isin(last, SETTINGS.stop_ids))
    assert 0 < r.truncated.sum() < 12
    for n in range(12):
        answer = [int(token) for token in r.completions[n, : r.completion_lengths[n]]]
        assert r.texts[n] == tokenizer.decode(answer)
        verdict = ACTOR.task.reward(r.prompt_records[r.prompt_index[n]], r.texts[n])
        assert r.rewards[n] == np.float32(verdict.total)
        assert {name: values[n] for name, values in r.reward_components.items()} == {
            name: np.float32(value) for name, value in verdict.components.items()
        }
    assert len(set(r.rewards.tolist())) > 1
    whole = (r.prompts, r.prompt_lengths, r.completions, r.completion_lengths, r.prompt_index)
    assert [x.dtype for x in (*whole, r.behaviour_log_probs, r.rewards, r.truncated)] == [np.int32] * 5 + [np.float32] * 2 + [bool]


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_generated():
    small = dataclasses.replace(ACTOR, settings=dataclasses.replace(SETTINGS, prompt_buckets=(4, 8)), model=None)
    with pytest.raises(ValueError, match=r"prompt of \d+ tokens is longer than the largest bucket of 8: shorten it or extend"):
        small.rollout(draw_weights(), WORK)
