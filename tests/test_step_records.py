"""What the rollouts alone say of a step: shares, speeds, samples."""

import dataclasses
import json

import numpy as np
import pytest

from pgrpo_jax.step_records import generation_metrics, samples_of
from pgrpo_jax.structs import Prompt, Rollouts, Work


def rollouts_of(index, rewards, lengths, secs):
    """Two prompts, two completions each."""
    prompts = tuple(Prompt(prompt_id=f"p{index}{i}", text=f"question {index}{i}", preference_id=i, facts={}) for i in range(2))
    zeros = np.zeros((4, 3))
    return Rollouts(
        work=Work(index=index, step=0, version=0), prompt_records=prompts, prompts=zeros[:2].astype(np.int32),
        prompt_lengths=np.array([3, 3], np.int32), completions=zeros.astype(np.int32), completion_lengths=np.array(lengths, np.int32),
        prompt_index=np.array([0, 0, 1, 1], np.int32), behaviour_log_probs=zeros.astype(np.float32),
        truncated=np.array(lengths) == 3, texts=tuple(f"answer {index}{i}" for i in range(4)), rewards=np.array(rewards, np.float32),
        reward_components={"answered": np.array([r > 0 for r in rewards], np.float32)}, generation_secs=secs,
    )  # fmt: skip


UNITS = [rollouts_of(0, [0, 1, 0.5, 0], [3, 1, 2, 3], 0.5), rollouts_of(1, [0, 0, 0.25, 0], [1, 1, 1, 1], 1.5)]


def test_generation_metrics():
    assert generation_metrics(UNITS, num_preference_groups=2) == {
        "answered": 3 / 8, "truncated": 2 / 8, "generation_secs": 2.0, "tokens_per_sec": 13 / 2.0,
        "preference_group/0/truncated": 1 / 4, "preference_group/1/truncated": 1 / 4,
    }  # fmt: skip
    found = generation_metrics([dataclasses.replace(UNITS[0], generation_secs=0.0)], num_preference_groups=3)
    assert np.isnan(found["tokens_per_sec"]) and np.isnan(found["preference_group/2/truncated"])
    uneven = [UNITS[0], dataclasses.replace(UNITS[1], truncated=np.array([True, False, False, False]))]
    found = generation_metrics(uneven, num_preference_groups=2)
    assert (found["preference_group/0/truncated"], found["preference_group/1/truncated"]) == (2 / 4, 1 / 4)


def test_a_step_without_completions_has_no_shares():
    names = ("completions", "completion_lengths", "prompt_index", "truncated", "rewards", "texts")
    none = {name: getattr(UNITS[0], name)[:0] for name in names}
    empty = dataclasses.replace(UNITS[0], **none, reward_components={"answered": np.zeros(0)})
    found = generation_metrics([empty], num_preference_groups=2)
    assert np.isnan([found[key] for key in ("answered", "truncated", "preference_group/0/truncated", "preference_group/1/truncated")]).all()


def test_samples_of():
    samples = samples_of(UNITS, np.arange(8.0), step=7)
    assert json.loads(json.dumps(samples)) == samples and len(samples) == 8
    assert samples[6] == {
        "step": 7, "prompt_id": "p11", "preference_id": 1, "prompt": "question 11", "answer": "answer 12", "reward": 0.25,
        "advantage": 6.0, "truncated": False,
    }  # fmt: skip
    with pytest.raises(ValueError):
        samples_of(UNITS, np.arange(7.0), step=7)
