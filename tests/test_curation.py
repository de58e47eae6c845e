"""What is trained on, against loops over prompts and completions, and literal numbers."""

import dataclasses

import learner_cases as cases
import numpy as np
import pytest

from pgrpo_jax import batching, curation
from pgrpo_jax.curation import Curation
from pgrpo_jax.structs import Work

RULES = Curation(prompts_per_step=4, max_new_tokens=cases.TC)


def step(*, prompts: int = 4, step: int = 7):
    """Two units of 4 prompts, the second two updates old; the second prompt earns the same everywhere, the last has one completion left."""
    units = []
    for index in range(2):
        unit = cases.rollouts(index, prompts=prompts, version=step - 2 * index, step=step)
        rewards = unit.rewards.copy()
        rewards[unit.prompt_index == 1] = 0.5
        records = tuple(dataclasses.replace(p, history_id=None if index else 2) for p in unit.prompt_records)
        parts = {"rating": rewards * 2, "answered": (rewards > 0.5).astype(np.float32)}
        units.append(dataclasses.replace(unit, prompt_records=records, rewards=rewards, reward_components=parts))
    keep = np.arange(prompts * cases.G - cases.G + 1)
    short = units[1]
    arrays = ("completions", "completion_lengths", "prompt_index", "behaviour_log_probs", "truncated", "rewards")
    units[1] = dataclasses.replace(
        short, texts=tuple(short.texts[i] for i in keep), **{name: getattr(short, name)[keep] for name in arrays},
        reward_components={name: values[keep] for name, values in short.reward_components.items()},
    )  # fmt: skip
    return tuple(units), batching.to_train_batch(units, completions_per_prompt=cases.G, pad_id=0)


def test_signals_follow_their_completions():
    units, batch = step()
    rules = dataclasses.replace(RULES, metric="answered", overlong_buffer=2, overlong_penalty=0.5)
    found = curation.signals(units, batch, rules, step=7, components=("answered", "rating"))
    rows = batching.completion_rows(units, completions_per_prompt=cases.G)
    expected = []
    for unit in units:
        for i, p in enumerate(unit.prompt_index):
            penalty = 0.5 * min(1.0, max(0.0, (unit.completion_lengths[i] - (cases.TC - 2)) / 2))
            answered, rating = float(unit.rewards[i] > 0.5), 2 * float(unit.rewards[i])
            record = unit.prompt_records[p]
            history = record.preference_id if record.history_id is None else record.history_id
            expected.append([answered - penalty, rating - penalty, answered, history, 7 - unit.work.version, unit.truncated[i]])
    columns = np.column_stack([found.rewards, found.raw, found.history_ids, found.staleness, found.truncated])[rows]
    np.testing.assert_allclose(columns, np.array(expected), rtol=1e-6)
    assert found.rewards.dtype == np.float32 and found.history_ids.dtype == found.staleness.dtype == np.int32
    assert set(found.staleness[rows]) == {0, 2} and found.rewards.shape == (32, 2)
    padding = np.setdiff1d(np.arange(32), rows)
    assert len(padding) == 3 and not batch.valid[padding].any()


def test_without_options_the_rewards_are_the_rewards():
    units, batch = step()
    found = curation.signals(units, batch, RULES, step=7)
    np.testing.assert_array_equal(found.rewards, batch.rewards)
    np.testing.assert_array_equal(found.raw, batch.rewards)


def test_an_unknown_component_is_named():
    units, batch = step()
    with pytest.raises(ValueError, match="no component 'wit', they have answered, rating: name one of these in algorithm.components"):
        curation.signals(units, batch, RULES, step=7, components=("wit",))


def test_the_overlong_penalty_is_dapos():
    rules = dataclasses.replace(RULES, max_new_tokens=20, overlong_buffer=4, overlong_penalty=2.0)
    lengths = np.array([0, 1, 16, 17, 18, 19, 20])
    np.testing.assert_allclose(curation.overlong_penalty(lengths, rules), [0, 0, 0, 0.5, 1.0, 1.5, 2.0])
    assert not curation.overlong_penalty(lengths, dataclasses.replace(rules, overlong_buffer=0)).any()


@pytest.mark.parametrize("select", curation.SELECT)
def test_informative_prompts_equal_a_loop(select):
    _, batch = step()
    rng = np.random.default_rng(3)
    advantages = np.where(rng.random(32) < 0.15, 0.4, 1e-5).astype(np.float32) * rng.choice([-1, 1], 32)
    rules = dataclasses.replace(RULES, select=select, min_information=0.3)
    found = curation.informative(rules, batch, batch.rewards, advantages)
    for p in range(8):
        mine = [i for i in range(32) if batch.prompt_index[i] == p and batch.valid[i]]
        differ = len({float(batch.rewards[i]) for i in mine}) > 1
        strong = any(abs(advantages[i]) >= 0.3 for i in mine)
        assert found[p] == {"any": True, "raw": differ, "information": strong}[select], (p, select)
    if select == "raw":
        assert list(np.flatnonzero(~found)) == [1, 5, 7]  # equal rewards twice, and the prompt with one completion


def test_a_dead_prompt_of_grpo_may_say_something_against_the_history():
    _, batch = step()
    advantages = np.where(batch.prompt_index == 1, 0.8, 0).astype(np.float32)
    by_raw, by_history = [
        curation.informative(dataclasses.replace(RULES, select=s), batch, batch.rewards, advantages) for s in ("raw", "information")
    ]
    assert not by_raw[1] and by_history[1]


def test_information_counts_from_its_bound_on():
    _, batch = step()
    advantages = np.where(batch.prompt_index == 0, 0.25, np.nextafter(np.float32(0.25), np.float32(0))).astype(np.float32)
    found = curation.informative(dataclasses.replace(RULES, select="information", min_information=0.25), batch, batch.rewards, advantages)
    assert list(np.flatnonzero(found)) == [0]


@pytest.mark.parametrize(
    "wanted, count, places, kept",
    [
        ([1, 1, 1, 1], 2, [0, 1], [1, 1]),
        ([0, 1, 0, 1, 1], 2, [1, 3], [1, 1]),
        ([0, 0, 0, 1, 0], 3, [0, 1, 3], [0, 0, 1]),
        ([0, 0, 0], 2, [0, 1], [0, 0]),
        ([1, 0], 2, [0, 1], [1, 0]),
    ],
)
def test_the_first_informative_prompts_fill_the_batch(wanted, count, places, kept):
    found, filled = curation.choose(np.array(wanted, bool), count)
    assert found.tolist() == places and filled.tolist() == [bool(x) for x in kept]


def test_the_batch_holds_the_chosen_and_masks_the_rest():
    units, batch = step()
    rules = dataclasses.replace(RULES, select="raw", mask_truncated=True)
    signals = curation.signals(units, batch, rules, step=7)
    advantages = np.arange(1, 33, dtype=np.float32)
    trained, weights, share = curation.train_on(batch, signals, advantages, rules)
    assert share == 5 / 8 and trained.prompts.shape[0] == 4 and len(trained.rewards) == 4 * cases.G
    for place, p in enumerate([0, 2, 3, 4]):  # 1 is dead; 5 and 7 too, and 6 comes too late
        np.testing.assert_array_equal(trained.prompts[place], batch.prompts[p])
        assert trained.preference_ids[place] == batch.preference_ids[p] and trained.prompt_lengths[place] == batch.prompt_lengths[p]
        for g in range(cases.G):
            row, source = place * cases.G + g, p * cases.G + g
            np.testing.assert_array_equal(trained.completions[row], batch.completions[source])
            assert trained.prompt_index[row] == place
            assert trained.valid[row] == (not signals.truncated[source])
            assert weights[row] == (0 if signals.truncated[source] else advantages[source])
    assert signals.truncated.any() and not trained.valid.all()


def test_too_few_informative_prompts_leave_the_batch_masked():
    units, batch = step()
    rules = dataclasses.replace(RULES, select="information", min_information=10.0)
    signals = curation.signals(units, batch, rules, step=7)
    advantages = np.where(batch.prompt_index == 6, 11.0, 1.0).astype(np.float32)
    trained, weights, share = curation.train_on(batch, signals, advantages, rules)
    assert share == 1 / 8 and trained.valid.reshape(4, -1).any(axis=1).tolist() == [False, False, False, True]
    assert weights.reshape(4, -1)[:3].sum() == 0 and (weights.reshape(4, -1)[3] == 11).all()


def test_nothing_asked_for_changes_nothing():
    units = (cases.rollouts(0, prompts=4),)
    batch = batching.to_train_batch(units, completions_per_prompt=cases.G, pad_id=0)
    signals = curation.signals(units, batch, RULES, step=0)
    trained, weights, share = curation.train_on(batch, signals, batch.rewards, RULES)
    assert share == 1.0 and units[0].work == Work(index=0, step=0, version=0)
    np.testing.assert_array_equal(weights, batch.rewards)
    for field in dataclasses.fields(batch):
        np.testing.assert_array_equal(getattr(trained, field.name), getattr(batch, field.name), err_msg=field.name)
