"""Rollouts into batches, against a loop over completions."""

import dataclasses

import learner_cases as cases
import numpy as np
import pytest

from pgrpo_jax import batching
from pgrpo_jax.structs import TrainBatch, Work

FIELDS = [field.name for field in dataclasses.fields(TrainBatch) if field.name != "packing"]


def unit(index: int, *, prompts: int, width: int, counts: list[int], seed: int):
    """Rollouts with `counts[p]` completions of prompt p in mixed order, and prompts padded to `width`."""
    rng = np.random.default_rng(seed)
    whole = cases.rollouts(index, prompts=max(prompts, 3))
    prompt_index = rng.permutation(np.repeat(np.arange(prompts), counts)).astype(np.int32)
    rows = rng.integers(0, len(whole.rewards), len(prompt_index))
    padded = np.full((prompts, width), cases.PAD, np.int32)
    padded[:, : min(width, cases.TP)] = whole.prompts[:prompts, :width]
    lengths = whole.completion_lengths[rows].copy()
    lengths[0] = 0
    return dataclasses.replace(
        whole, prompt_records=whole.prompt_records[:prompts],
        prompts=padded, prompt_lengths=np.minimum(whole.prompt_lengths[:prompts], width),
        completions=whole.completions[rows], completion_lengths=lengths, prompt_index=prompt_index,
        behaviour_log_probs=whole.behaviour_log_probs[rows], truncated=whole.truncated[rows],
        texts=tuple(f"answer {i}" for i in rows), rewards=rng.random(len(rows)).astype(np.float32),
    )  # fmt: skip


def uneven():
    """Three units: different prompt widths, fewer than G completions, a prompt without any, completions in mixed order."""
    return (
        unit(3, prompts=3, width=4, counts=[4, 1, 0], seed=0),
        unit(4, prompts=1, width=9, counts=[3], seed=1),
        unit(5, prompts=2, width=6, counts=[2, 4], seed=2),
    )


def loop(units, *, completions_per_prompt: int, pad_id: int) -> TrainBatch:
    """The same batch, token by token in lists."""
    width = max(r.prompts.shape[1] for r in units)
    lists = {name: [] for name in FIELDS}
    for r in units:
        for p, record in enumerate(r.prompt_records):
            number = len(lists["prompts"])
            lists["prompts"].append([int(t) for t in r.prompts[p]] + [pad_id] * (width - r.prompts.shape[1]))
            lists["prompt_lengths"].append(r.prompt_lengths[p])
            lists["preference_ids"].append(record.preference_id)
            mine = [i for i in range(len(r.rewards)) if r.prompt_index[i] == p]
            for i in mine + [None] * (completions_per_prompt - len(mine)):
                lists["prompt_index"].append(number)
                lists["valid"].append(i is not None)
                lists["rewards"].append(0.0 if i is None else r.rewards[i])
                lists["completions"].append([pad_id] * cases.TC if i is None else list(r.completions[i]))
                lists["behaviour_log_probs"].append([0.0] * cases.TC if i is None else list(r.behaviour_log_probs[i]))
                lists["completion_mask"].append([i is not None and t < r.completion_lengths[i] for t in range(cases.TC)])
    return TrainBatch(**{name: np.array(values) for name, values in lists.items()})


@pytest.mark.parametrize("units, completions_per_prompt", [(uneven(), 4), (uneven(), 6), ((cases.rollouts(0), cases.rollouts(1)), cases.G)])
def test_equals_a_loop(units, completions_per_prompt):
    batch = batching.to_train_batch(units, completions_per_prompt=completions_per_prompt, pad_id=29)
    expected = loop(units, completions_per_prompt=completions_per_prompt, pad_id=29)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(batch, name), getattr(expected, name), err_msg=name, strict=False)
    dtypes = {name: getattr(batch, name).dtype for name in FIELDS}
    floats, bools = {"behaviour_log_probs", "rewards"}, {"completion_mask", "valid"}
    assert dtypes == {name: np.float32 if name in floats else bool if name in bools else np.int32 for name in FIELDS}


@pytest.mark.parametrize("longest, width", [(0, 64), (1, 64), (64, 64), (65, 128), (128, 128), (192, 192), (193, 200), (200, 200)])
def test_completions_are_cut_behind_the_longest_of_the_step(longest, width):
    """At most 200 tokens: widths of 64, 128, 192 and 200."""
    units, rng = [], np.random.default_rng(longest)
    for index, most in ((0, min(longest, 3)), (1, longest)):
        whole = unit(index, prompts=2, width=4, counts=[2, 2], seed=index)
        lengths = np.array([0, most, most // 2, most], np.int32)
        tokens, scores = rng.integers(1, 20, (4, 200)).astype(np.int32), rng.normal(size=(4, 200)).astype(np.float32)
        units.append(dataclasses.replace(whole, completions=tokens, behaviour_log_probs=scores, completion_lengths=lengths))
    batch = batching.to_train_batch(units, completions_per_prompt=2, pad_id=29)
    rows = batching.completion_rows(units, completions_per_prompt=2)
    for name in ("completions", "behaviour_log_probs"):
        np.testing.assert_array_equal(getattr(batch, name)[rows], np.concatenate([getattr(r, name)[:, :width] for r in units]))
    lengths = np.concatenate([r.completion_lengths for r in units])
    np.testing.assert_array_equal(batch.completion_mask[rows].sum(axis=1), lengths)
    assert batch.completion_mask.shape == (8, width)


def test_rows_lead_back_to_the_completions_in_canonical_order():
    units = uneven()
    batch = batching.to_train_batch(units, completions_per_prompt=4, pad_id=0)
    rows = batching.completion_rows(units, completions_per_prompt=4)
    np.testing.assert_array_equal(batch.rewards[rows], np.concatenate([r.rewards for r in units]))
    assert sorted(rows) == list(np.flatnonzero(batch.valid)), "every valid row belongs to exactly one completion"


def test_more_than_g_completions_are_refused():
    units = uneven()
    with pytest.raises(ValueError, match=r"^prompt prompt-3-0 has 4 completions, more than completions_per_prompt = 3: raise [^\n]*$"):
        batching.to_train_batch(units, completions_per_prompt=3, pad_id=0)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_slices_are_whole_prompts(count):
    batch = cases.batch("slices")
    sliced = batching.micro_batches(batch, count)
    per_slice = cases.P // count
    for name in FIELDS:
        shape = getattr(batch, name).shape
        assert getattr(sliced, name).shape == (count, shape[0] // count, *shape[1:])
    for m in range(count):
        for row in range(per_slice * cases.G):
            whole = m * per_slice * cases.G + row
            np.testing.assert_array_equal(sliced.completions[m, row], batch.completions[whole])
            prompt = sliced.prompt_index[m, row]
            assert 0 <= prompt < per_slice
            np.testing.assert_array_equal(sliced.prompts[m, prompt], batch.prompts[batch.prompt_index[whole]])
    assert sliced.prompt_index.dtype == np.int32


def test_prompts_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"^8 prompts do not divide into 3 micro-batches: set learner.micro_batches [^\n]*$"):
        batching.micro_batches(cases.batch("slices"), 3)


def refused(units, match: str, **options):
    with pytest.raises(ValueError, match=match) as caught:
        batching.check(units, **({"num_preference_groups": cases.K, "version": 0} | options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_reward_that_is_no_number_is_refused(value):
    first, second = cases.rollouts(0), cases.rollouts(1)
    second.rewards[9] = value
    refused((first, second), rf"reward {value} of prompt prompt-1-2, answer 'answer 1-9', is not finite: .*fix the task's reward$")


@pytest.mark.parametrize("preference_id", [-1, cases.K])
def test_a_preference_id_out_of_range_is_refused(preference_id):
    unit = cases.rollouts(0)
    records = list(unit.prompt_records)
    records[2] = dataclasses.replace(records[2], preference_id=preference_id)
    wrong = dataclasses.replace(unit, prompt_records=tuple(records))
    refused((wrong,), rf"prompt prompt-0-2 has preference id {preference_id}, outside \[0, 3\): .*")


@pytest.mark.parametrize("row", [-1, cases.K])
def test_a_history_row_out_of_range_is_refused(row):
    """An arm that files rewards where no history is would lose them silently."""
    unit = cases.rollouts(0)
    records = list(unit.prompt_records)
    records[2] = dataclasses.replace(records[2], history_id=row)
    refused((dataclasses.replace(unit, prompt_records=tuple(records)),), rf"prompt prompt-0-2 has history row {row}, outside \[0, 3\): .*")


def test_rollouts_of_another_version_are_refused():
    other = dataclasses.replace(cases.rollouts(1), work=Work(index=1, step=4, version=2))
    match = "work unit 1 was generated by weight version 2, this step is trained on version 3: .*"
    refused((cases.rollouts(0, version=3), other), match, version=3)


def test_several_versions_pass_where_they_may():
    units = cases.rollouts(0, version=3), cases.rollouts(1, version=1)
    batching.check(units, num_preference_groups=cases.K, version=None)
    refused(units, "work unit 1 was generated by weight version 1, .*", version=3)


def test_good_rollouts_pass():
    batching.check((cases.rollouts(0), *uneven()), num_preference_groups=cases.K, version=0)
