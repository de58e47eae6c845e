"""A dumped batch comes back to the bit, and a file that is none is refused."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pgrpo_jax.batch_files import dump_batch, load_batch
from pgrpo_jax.structs import TrainBatch

FIELDS = [field.name for field in dataclasses.fields(TrainBatch)]


def make_batch(leading=(), *, packed=False):
    random = np.random.default_rng(0)

    def ints(*shape):
        return random.integers(0, 9, (*leading, *shape)).astype(np.int32)

    return TrainBatch(
        prompts=ints(2, 3), prompt_lengths=ints(2), preference_ids=ints(2), completions=ints(4, 5), prompt_index=ints(4),
        completion_mask=random.random((*leading, 4, 5)) < 0.5, behaviour_log_probs=random.normal(size=(*leading, 4, 5)).astype(np.float32),
        rewards=np.full((*leading, 4), np.nan, np.float32), valid=random.random((*leading, 4)) < 0.5,
        packing=ints(2, 1, 5) - 1 if packed else None,
    )  # fmt: skip


@pytest.mark.parametrize("leading", [(), (2,)])
@pytest.mark.parametrize("with_old", [True, False])
def test_a_batch_comes_back_to_the_bit(leading, with_old, tmp_path):
    batch = make_batch(leading, packed=with_old)
    advantages = np.arange(np.size(batch.rewards), dtype=np.float32).reshape(batch.rewards.shape)
    old = jnp.asarray(batch.behaviour_log_probs) if with_old else None
    path = tmp_path / "made" / "batch.npz"
    dump_batch(path, batch, advantages, old, None)
    read = load_batch(path)
    for name in FIELDS:
        expected = getattr(batch, name)
        if name == "packing" and not with_old:
            assert expected is None and read.batch.packing is None
            continue
        assert getattr(read.batch, name).dtype == expected.dtype
        np.testing.assert_array_equal(getattr(read.batch, name), expected)
    np.testing.assert_array_equal(read.advantages, advantages)
    assert read.reference_log_probs is None and (read.old_log_probs is not None) == with_old
    if with_old:
        np.testing.assert_array_equal(read.old_log_probs, batch.behaviour_log_probs)


@pytest.mark.parametrize("name", ["advantages", "old_log_probs", "reference_log_probs"])
def test_what_is_of_another_batch_is_refused(name, tmp_path):
    batch = make_batch()
    values = {"advantages": np.zeros(4, np.float32), "old_log_probs": None, "reference_log_probs": None} | {name: np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match=rf"{name} has shape \(3,\), the batch needs \(4"):
        dump_batch(tmp_path / "batch.npz", batch, *values.values())
    assert not (tmp_path / "batch.npz").exists()


@pytest.mark.parametrize("damage", ["short", "text", "another archive", "empty"])
def test_files_that_are_no_batch_are_refused(damage, tmp_path):
    path = tmp_path / "batch.npz"
    dump_batch(path, make_batch(), np.zeros(4, np.float32), None, None)
    content = path.read_bytes()
    if damage == "another archive":
        np.savez(path, a=np.zeros(2))
    else:
        path.write_bytes({"short": content[: len(content) // 2], "text": b"not a batch", "empty": b""}[damage])
    with pytest.raises(ValueError, match="batch.npz is damaged or no batch .*: dump it again"):
        load_batch(path)


def test_no_flipped_byte_changes_a_value_unnoticed(tmp_path):
    path, batch = tmp_path / "batch.npz", make_batch()
    dump_batch(path, batch, np.zeros(4, np.float32), batch.behaviour_log_probs, None)
    content, refused = path.read_bytes(), 0
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            read = load_batch(path)
        except ValueError:
            refused += 1
            continue
        for name in FIELDS:  # the byte was one that does not matter, such as a date
            np.testing.assert_array_equal(getattr(read.batch, name), getattr(batch, name))
    assert refused > len(content) // 3 // 2


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.npz does not exist"):
        load_batch(tmp_path / "nothing.npz")
