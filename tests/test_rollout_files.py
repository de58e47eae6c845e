"""The rollouts of a step survive their file: every array, every text, every fact."""

import dataclasses
import io
import zipfile

import numpy as np
import pytest

from pgrpo_jax.rollout_files import load_rollouts, pack_rollouts
from pgrpo_jax.structs import Prompt, RewardFailure, Rollouts, Work


def unit(seed, index):
    random = np.random.default_rng(seed)
    failures = (RewardFailure(1, "ZeroDivisionError: \udc80", "zero"), RewardFailure(3, "timeout", "drop"))
    facts = {"titles": ["Misérables, Les"], "ratings": {"a": 4.5, "b": None}}
    prompts = (Prompt("u1", "Which film?\u2028\x1b[2J", 0, facts), Prompt("u2", "", 3, {}))
    return Rollouts(
        work=Work(index=index, step=4, version=3, split="train", failed_rewards=failures[:1]),
        prompt_records=prompts, reward_failures=failures,
        prompts=random.integers(0, 99, (2, 5), dtype=np.int32), prompt_lengths=np.array([5, 2], np.int32),
        completions=random.integers(0, 99, (4, 3), dtype=np.int32), completion_lengths=np.array([3, 0, 1, 2], np.int32),
        prompt_index=np.array([0, 0, 1, 1], np.int32), behaviour_log_probs=random.normal(size=(4, 3)).astype(np.float32),
        truncated=np.array([True, False, False, True]), texts=("Fargo", "", "lone \udc80 surrogate", "\x00<script>"),
        rewards=np.array([0.8, 0.0, np.nan, -1.0], np.float32),
        reward_components={"answered": np.ones(4, np.float32), "rating/5": np.zeros(4, np.float32)}, generation_secs=1.25)


def assert_same(a, b):
    for field in dataclasses.fields(Rollouts):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype, field.name
            np.testing.assert_array_equal(left, right)
        elif field.name == "reward_components":
            assert list(left) == list(right)
            for name in left:
                assert left[name].dtype == right[name].dtype
                np.testing.assert_array_equal(left[name], right[name])
        else:
            assert left == right, field.name


def test_round_trip(tmp_path):
    units = [unit(0, 7), unit(1, 8)]
    (tmp_path / "step.npz").write_bytes(pack_rollouts(units))
    loaded = load_rollouts(tmp_path / "step.npz")
    assert len(loaded) == 2
    for before, after in zip(units, loaded):
        assert_same(before, after)


def test_no_rollouts_round_trip(tmp_path):
    (tmp_path / "step.npz").write_bytes(pack_rollouts([]))
    assert load_rollouts(tmp_path / "step.npz") == []


def test_equal_rollouts_make_equal_bytes():
    assert pack_rollouts([unit(0, 7)]) == pack_rollouts([unit(0, 7)]) != pack_rollouts([unit(0, 8)])


def test_damaged_files_are_one_line_errors(tmp_path):
    whole, path = pack_rollouts([unit(0, 7)]), tmp_path / "step.npz"
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("records.npy", b"no array")
    for content in (b"", b"garbage", whole[:len(whole) // 2], whole[:-10], other.getvalue()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="step.npz is damaged or no rollouts file") as caught:
            load_rollouts(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_rollouts(tmp_path / "missing.npz")


def test_pickles_are_refused(tmp_path):
    np.savez(tmp_path / "step.npz", records=np.array([{"work": 1}], dtype=object))
    with pytest.raises(ValueError, match="damaged or no rollouts file"):
        load_rollouts(tmp_path / "step.npz")
