"""The actor: a rollout is a pure function of (weights, work), and its fields agree with one another."""

import dataclasses
import zlib

import jax
import numpy as np
import pytest

from pgrpo_jax.actor import Actor, Sizes
from pgrpo_jax.generation import engine
from pgrpo_jax.generation.sampler import Support
from pgrpo_jax.models import transformer
from pgrpo_jax.models.config import ModelConfig
from pgrpo_jax.models.parameters import parameter_shapes
from pgrpo_jax.models.tokenizer import ByteTokenizer
from pgrpo_jax.structs import Reward, RewardFailure, Work
from pgrpo_jax.tasks import letters

CONFIG = ModelConfig(
    num_layers=1, width=8, mlp_width=8, num_heads=2, num_kv_heads=1, head_dim=4, vocab_size=259, context_length=64, rope_theta=100.0,
    norm_epsilon=1e-5, tied_embeddings=True,
)  # fmt: skip
# the padding is a letter: one that slipped into an answer would be seen
SETTINGS = engine.GenerationSettings(
    max_new_tokens=8, support=Support(temperature=0.8), stop_ids=(257, *range(33, 60)), pad_id=120, prompt_buckets=(16, 40)
)
TASK = letters.load("", seed=0, num_preference_groups=3)


class Judge:
    """Judges by the task; the rows that `outcome` names get its policy's outcome instead. Keeps what it was asked."""

    def __init__(self, **outcome):
        self.outcome, self.asked = {int(row.strip("_")): policy for row, policy in outcome.items()}, []

    def judge(self, prompts, answers, failed=()):
        self.asked.append((list(prompts), list(answers), failed))
        nothing = {"zero": Reward(0.0, {"answered": 0.0, "share": 0.0}), "drop": None}
        verdicts = [nothing[self.outcome[i]] if i in self.outcome else TASK.reward(*pair) for i, pair in enumerate(zip(prompts, answers))]
        return verdicts, tuple(RewardFailure(row, "timeout after 1 s", policy) for row, policy in self.outcome.items())


ACTOR = Actor(
    model=transformer.Transformer(CONFIG),
    tokenizer=ByteTokenizer(),
    task=TASK,
    rewards=Judge(),
    settings=SETTINGS,
    sizes={"train": Sizes(prompts_per_work=3, completions_per_prompt=4), "test": Sizes(prompts_per_work=2, completions_per_prompt=5)},
    seed=7,
)
WORK = Work(index=5, step=2, version=1)


def draw_weights(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda spec: rng.normal(0, 0.5, spec.shape).astype(np.float32), parameter_shapes(CONFIG))


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
    prompts, answers = (len(rollouts.prompts), len(rollouts.texts) // len(rollouts.prompts))
    assert (prompts, answers) == {"train": (3, 4), "test": (2, 5)}[split]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), zlib.crc32(f"rollouts/{split}".encode())), 5)
    again = engine.generate(
        ACTOR.model, draw_weights(), rollouts.prompts, rollouts.prompt_lengths, key, completions_per_prompt=answers, settings=SETTINGS
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


def test_a_split_without_sizes_is_refused():
    with pytest.raises(ValueError, match=r"work unit 5 is of split 'dev', sizes are known for \['test', 'train'\]"):
        ACTOR.generate(draw_weights(), Work(index=5, step=0, version=0, split="dev"))


def test_every_answer_is_judged_with_its_prompt_and_what_is_on_record():
    judge, recorded = Judge(), (RewardFailure(3, "killed", "zero"),)
    work = dataclasses.replace(WORK, failed_rewards=recorded)
    rollouts = dataclasses.replace(ACTOR, rewards=judge).rollout(draw_weights(), work)
    ((prompts, answers, failed),) = judge.asked
    assert prompts == [p for p in TASK.prompts("train", 5, 3) for _ in range(4)]
    assert tuple(answers) == rollouts.texts and failed == recorded and rollouts.work == work and rollouts.reward_failures == ()


def test_judging_another_time_and_in_another_order_changes_nothing():
    works = [dataclasses.replace(WORK, index=i) for i in range(3)]
    generated = [ACTOR.generate(draw_weights(), work) for work in works]
    late = [ACTOR.judge(g) for g in reversed(generated)][::-1]
    assert [content(r) for r in late] == [content(ACTOR.rollout(draw_weights(), work)) for work in works]


@pytest.mark.parametrize(
    "outcome", [{"_0": "drop", "_5": "drop"}, {f"_{i}": "drop" for i in range(4, 8)}, {f"_{i}": "drop" for i in range(12)}],
    ids=["some", "a_prompt", "all"],
)  # fmt: skip
def test_dropped_answers_leave_every_array(outcome):
    whole = ACTOR.rollout(draw_weights(), WORK)
    left = dataclasses.replace(ACTOR, rewards=Judge(**outcome)).rollout(draw_weights(), WORK)
    kept = [i for i in range(12) if f"_{i}" not in outcome]
    for name in ("completions", "completion_lengths", "prompt_index", "behaviour_log_probs", "truncated", "rewards"):
        before, after = getattr(whole, name), getattr(left, name)
        assert after.dtype == before.dtype and after.shape == (len(kept), *before.shape[1:]), name
        np.testing.assert_array_equal(after, before[kept])
    assert set(left.reward_components) == {"answered", "share"}
    for name, values in left.reward_components.items():
        assert values.dtype == np.float32 and values.shape == (len(kept),)
        np.testing.assert_array_equal(values, whole.reward_components[name][kept])
    assert left.texts == tuple(whole.texts[i] for i in kept)
    assert left.prompt_records == whole.prompt_records and np.array_equal(left.prompts, whole.prompts)
    assert [failure.row for failure in left.reward_failures] == [int(row[1:]) for row in outcome]


def test_answers_that_count_zero_stay():
    whole = ACTOR.rollout(draw_weights(), WORK)
    zero = dataclasses.replace(ACTOR, rewards=Judge(_2="zero", _11="zero")).rollout(draw_weights(), WORK)
    np.testing.assert_array_equal(zero.rewards, np.where(np.isin(np.arange(12), [2, 11]), np.float32(0), whole.rewards))
    np.testing.assert_array_equal(zero.completions, whole.completions)
    assert zero.reward_failures == (RewardFailure(2, "timeout after 1 s", "zero"), RewardFailure(11, "timeout after 1 s", "zero"))
