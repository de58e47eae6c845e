"""Difficulty: estimates against a loop over all rewards, whatever files they come in; a file that is damaged is named."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pgrpo_jax.structs import Prompt, Rollouts, Work
from pgrpo_jax.tasks import difficulty
from pgrpo_jax.tasks.difficulty import Estimate


def unit(names, prompt_index, rewards):
    """A unit of work in which completion i answers prompt `prompt_index[i]`."""
    n, p = len(rewards), len(names)
    return Rollouts(
        work=Work(0, 0, 0), prompt_records=tuple(Prompt(name, "?", 0, {}) for name in names), prompts=np.zeros((p, 1), np.int32),
        prompt_lengths=np.ones(p, np.int32), completions=np.zeros((n, 1), np.int32), completion_lengths=np.ones(n, np.int32),
        prompt_index=np.array(prompt_index, np.int32), behaviour_log_probs=np.zeros((n, 1), np.float32), truncated=np.zeros(n, bool),
        texts=("",) * n, rewards=np.array(rewards, np.float32), reward_components={},
    )  # fmt: skip


UNITS = (
    unit(["b", "a", "never"], [0, 1, 0, 0], [0.5, 1.0, 0.25, 0.75]),  # uneven, and all answers to "never" were dropped
    unit(["c", "a"], [1, 0, 1], [0.0, 1e6, 0.5]),
    unit(["d"], [], []),
)
BY_HAND = {"a": [1.0, 0.0, 0.5], "b": [0.5, 0.25, 0.75], "c": [1e6]}


def check(found, rewards):
    assert list(found) == sorted(rewards)
    for name, values in rewards.items():
        mean = sum(values) / len(values)
        std = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
        assert found[name].count == len(values)
        assert (found[name].mean, found[name].std) == pytest.approx((mean, std), rel=1e-9, abs=1e-9)


def test_estimates_against_a_loop():
    check(difficulty.measure(UNITS), BY_HAND)
    assert difficulty.measure([]) == {}
    assert difficulty.measure(UNITS)["c"].std == 0.0


def test_estimates_of_several_files_merge():
    parts = [difficulty.measure([u]) for u in UNITS]
    check(difficulty.merge(*parts), BY_HAND)
    check(difficulty.merge(*parts[::-1]), BY_HAND)
    assert difficulty.merge() == {} and difficulty.merge(parts[0]) == parts[0]


@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=6), min_size=1, max_size=5), st.floats(-1e4, 1e4))
@hypothesis_settings(max_examples=60, deadline=None)
def test_a_merge_is_as_if_all_were_seen_at_once(parts, offset):
    parts = [[value + offset for value in part] for part in parts]
    found = difficulty.merge(*({"p": Estimate(float(np.mean(part)), float(np.std(part)), len(part))} for part in parts))["p"]
    everything = np.array([value for part in parts for value in part])
    assert found.count == len(everything)
    assert (found.mean, found.std) == pytest.approx((everything.mean(), everything.std()), rel=1e-9, abs=1e-5)


def test_a_file_is_read_back_equal_and_two_are_the_same_bytes(tmp_path):
    found = difficulty.measure(UNITS)
    difficulty.write(tmp_path / "one.json", found)
    difficulty.write(tmp_path / "two.json", dict(reversed(found.items())))
    assert difficulty.read(tmp_path / "one.json") == found
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert json.loads((tmp_path / "one.json").read_text())["b"] == {"mean": 0.5, "std": pytest.approx(0.2041241), "count": 3}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\xff\xfe", "is no JSON"),
        (b'{"a": ', "is no JSON"),
        (b"[]", "holds a list, not an object"),
        (b'{"a": 3}', "'a' is 3: write"),
        (b'{"a": {"mean": 1, "std": 0}}', "'a' is {'mean': 1, 'std': 0}: write"),
        (b'{"a": {"mean": NaN, "std": 0, "count": 1}}', "'a' is {'mean': nan"),
        (b'{"a": {"mean": "1", "std": 0, "count": 1}}', "'a' is {'mean': '1'"),
        (b'{"a": {"mean": 1, "std": -0.5, "count": 1}}', "'std': -0.5"),
        (b'{"a": {"mean": 1, "std": 0, "count": 0}}', "'count': 0"),
        (b'{"a": {"mean": 1, "std": 0, "count": 1.5}}', "'count': 1.5"),
        (b'{"a": {"mean": 1, "std": 0, "count": true}}', "'count': True"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, content, message):
    (tmp_path / "d.json").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        difficulty.read(tmp_path / "d.json")
    assert message in str(caught.value) and "d.json" in str(caught.value) and "\n" not in str(caught.value)


def test_other_faults(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.json does not exist: measure"):
        difficulty.read(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="reward of prompt a is nan, not finite"):
        difficulty.measure([unit(["a"], [0], [float("nan")])])
