"""The evaluation record against loops over a hand-made task; intervals against a closed form, and how often they cover the truth."""

import dataclasses
import json
import pathlib
import shutil
import types

import numpy as np
import pytest
import small_config

from pgrpo_jax import evaluate
from pgrpo_jax.deployment import Deployment
from pgrpo_jax.engines.inline import InlineEngine
from pgrpo_jax.preemption import Preempted, Stop
from pgrpo_jax.run_directory import RunDirectory
from pgrpo_jax.structs import Prompt, Rollouts, Work
from pgrpo_jax.train import train

PREFERENCE_IDS = [0, 0, 0, 2, 2, 3, 0, 2]  # nobody of preference group 1, one prompt of 3
ANSWERS = ["a", "b", "?", "a b", "b", "a", "?", "?", "a", "a", "?", "?", "b", "b", "a", "b"]  # two for each prompt
REWARDS = [1, 0.2, 0, 0, 0.4, 0.6, 0, 0, 0.8, 1, 0, 0, 0.2, 0.4, 0.6, 1]


class TwoCandidates:
    """Candidates "a" and "b"; an answer names one by saying just that."""

    num_preference_groups = 4
    preference_group_names = ("north", "east", "south", "west")

    def choice(self, prompt, answer):
        return {"a": 0, "b": 1}.get(answer)

    def baselines(self, prompts):
        return {"random": np.array([0.1 * (1 + p.facts["place"]) for p in prompts]), "popular": np.array([0.5 for _ in prompts])}


def units(answers=ANSWERS, rewards=REWARDS, preference_ids=PREFERENCE_IDS, per_unit=4):
    """Rollouts of four prompts each, two answers to a prompt."""
    made = []
    for index, first in enumerate(range(0, len(preference_ids), per_unit)):
        places = range(first, first + per_unit)
        prompts = tuple(Prompt(f"p{i}", "?", preference_ids[i], {"place": i}) for i in places)
        texts = tuple(answers[2 * first : 2 * (first + per_unit)])
        blank = np.zeros((2 * per_unit, 1), np.int32)
        made.append(Rollouts(
            work=Work(index=index, step=0, version=0, split="test"), prompt_records=prompts, prompts=blank[:per_unit],
            prompt_lengths=blank[:per_unit, 0] + 1, completions=blank, completion_lengths=blank[:, 0] + 1,
            prompt_index=np.repeat(np.arange(per_unit, dtype=np.int32), 2), behaviour_log_probs=blank.astype(np.float32),
            truncated=blank[:, 0] > 0, texts=texts, rewards=np.array(rewards[2 * first : 2 * (first + per_unit)], np.float32),
            reward_components={"answered": np.array([t in ("a", "b") for t in texts], np.float32)},
        ))  # fmt: skip
    return made


def by_loops(rows):
    """The record of some prompts, one answer at a time."""
    task = TwoCandidates()
    rewards, answered, first, gains = [], [], [], []
    for i in rows:
        for j in (2 * i, 2 * i + 1):
            rewards.append(float(np.float32(REWARDS[j])))
            named = task.choice(None, ANSWERS[j])
            answered.append(named is not None)
            if named is not None:
                first.append(named == 0)
                gains.append(rewards[-1] - 0.1 * (1 + i))

    def mean(values):
        return sum(values) / len(values) if values else None

    return {
        "num_prompts": len(rows),
        "reward": mean(rewards),
        "answer_rate": mean(answered),
        "reward_given_answer": mean([r for r, a in zip(rewards, answered) if a]),
        "first_candidate_share": mean(first),
        "gain": mean(gains),
        "random": mean([0.1 * (1 + i) for i in rows]),
    }


def check(record, rows):
    expected = by_loops(rows)
    found = {key: record.get(key) for key in expected} | {
        "gain": record["advantage_over_random"]["mean"],
        "random": record["baselines"]["random"],
    }
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key] is None) == (value is None), key
        assert value is None or found[key] == pytest.approx(value, rel=1e-12), key
    assert record["baselines"]["popular"] == 0.5
    assert record["intervals"]["reward"]["mean"] == pytest.approx(expected["reward"])
    assert record["intervals"]["answer_rate"]["mean"] == pytest.approx(expected["answer_rate"])


def test_the_record_against_loops():
    record = evaluate.summarise(TwoCandidates(), units(), step=7)
    assert json.loads(json.dumps(record)) == record
    assert (record["step"], record["completions_per_prompt"], record["prompts_per_work"]) == (7, 2, 4)
    check(record, range(8))
    parts = record["per_preference_group"]
    assert list(parts) == ["0", "2", "3"]  # nothing is said about people that were not asked
    for p, part in parts.items():
        check(part, [i for i, preference_id in enumerate(PREFERENCE_IDS) if preference_id == int(p)])
    assert [part["name"] for part in parts.values()] == ["north", "south", "west"]
    rewards = {p: part["reward"] for p, part in parts.items()}
    assert record["worst_preference_group"] == "3" and rewards["3"] == 0
    assert record["gap"] == pytest.approx(max(rewards.values()) - 0)


def test_nobody_answered_and_one_prompt():
    west = evaluate.summarise(TwoCandidates(), units(), step=0)["per_preference_group"]["3"]
    assert (west["num_prompts"], west["answer_rate"], west["reward_given_answer"], west["first_candidate_share"]) == (1, 0.0, None, None)
    assert west["advantage_over_random"] == {"mean": None, "low": None, "high": None}
    assert west["intervals"]["reward"] == {"mean": 0.0, "low": None, "high": None}


def test_the_order_of_units_is_the_order_of_the_stream():
    whole = evaluate.summarise(TwoCandidates(), units(per_unit=8), step=0)
    sliced = evaluate.summarise(TwoCandidates(), units(per_unit=2), step=0)
    assert whole.pop("prompts_per_work") == 8 and sliced.pop("prompts_per_work") == 2 and whole == sliced


def test_interval_of_equal_values_has_no_width():
    found = evaluate.interval(np.full((10, 3), 0.25), np.ones((10, 3), bool), name="x")
    assert found == {"mean": 0.25, "low": 0.25, "high": 0.25}


def test_interval_against_the_closed_form():
    """Of 0 and 1 with one answer each, the resampled mean is binomial."""
    size, share = 200, 0.3
    values = (np.arange(size) < share * size).astype(float)[:, None]
    found = evaluate.interval(values, np.ones((size, 1), bool), name="x")
    half = 1.959964 * np.sqrt(share * (1 - share) / size)
    assert found["mean"] == pytest.approx(share)
    assert found["low"] == pytest.approx(share - half, abs=0.01) and found["high"] == pytest.approx(share + half, abs=0.01)


def test_interval_counts_what_is_counted_and_users_not_answers():
    rng = np.random.default_rng(0)
    values, counted = rng.normal(size=(40, 3)), rng.random((40, 3)) < 0.6
    assert evaluate.interval(values, counted, name="x")["mean"] == pytest.approx(values[counted].mean())
    alike = np.repeat(rng.normal(size=(40, 1)), 9, axis=1)  # nine equal answers of a user say no more than one
    one, nine = (evaluate.interval(alike[:, :n], np.ones((40, n), bool), name="x") for n in (1, 9))
    assert one == pytest.approx(nine)
    assert evaluate.interval(values, counted, name="x") == evaluate.interval(values, counted, name="x")
    assert evaluate.interval(values, counted, name="x")["low"] != evaluate.interval(values, counted, name="y")["low"]


@pytest.mark.parametrize("answering", [0, 1])
def test_interval_needs_two_prompts_that_count(answering):
    counted = np.zeros((5, 2), bool)
    counted[:answering] = True
    found = evaluate.interval(np.full((5, 2), 0.5), counted, name="x")
    assert found == {"mean": 0.5 if answering else None, "low": None, "high": None}


def test_interval_covers_the_truth_as_often_as_it_says():
    """64 users with 4 answers each around a mean of their own; 95 % within the error of 300 trials (3 sigma is 0.04)."""
    rng, covered = np.random.default_rng(3), 0
    for trial in range(300):
        values = rng.normal(size=(64, 1)) + rng.normal(size=(64, 4))
        counted = rng.random((64, 4)) < 0.8
        found = evaluate.interval(values, counted, name=f"trial {trial}")
        covered += found["low"] <= 0 <= found["high"]
    assert 0.90 <= covered / 300 <= 0.98


pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert train(small_config.config(), identity=small_config.identity(), workdir=workdir, stop=Stop()) == 0
    return workdir


@pytest.fixture
def copy(finished, tmp_path):
    return pathlib.Path(shutil.copytree(finished, tmp_path / "copy"))


def evaluated(workdir, stop=None, **changes):
    config, identity = small_config.config(**changes), small_config.identity(**changes)
    return evaluate.evaluate_run(config, identity=identity, workdir=workdir, stop=stop or Stop())


def files(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_a_recorded_evaluation_is_shown_and_nothing_is_written(copy, capsys):
    before = files(copy)
    assert evaluated(copy) == 0
    shown = capsys.readouterr().out
    assert files(copy) == before
    record = RunDirectory(copy).summary()["evaluation"]["after"]
    assert f"step 12 of {copy}" in shown and "before -> after" in shown
    assert f"worst preference group {record['worst_preference_group']}, gap between best and worst {record['gap']:.3f} reward" in shown


def test_the_same_settings_give_the_same_record(copy):
    expected = (copy / "evaluation_000012.json").read_text()
    (copy / "evaluation_000012.json").unlink()
    assert evaluated(copy) == 0
    assert (copy / "evaluation_000012.json").read_text() == expected


def test_other_settings_are_evaluated_and_touch_no_other_record(copy, capsys):
    before = files(copy)
    assert evaluated(copy, evaluation__num_prompts=16, evaluation__completions_per_prompt=1, checkpoint__save_every=7) == 0
    after = files(copy)
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == {"evaluation_000012.json"}
    record = json.loads(after["evaluation_000012.json"])
    assert (record["num_prompts"], record["completions_per_prompt"], record["prompts_per_work"]) == (16, 1, 4)
    assert "before -> after" not in capsys.readouterr().out  # the untrained policy was evaluated with other settings


def test_a_run_that_is_saving_is_left_alone(copy):
    unfinished = copy / "checkpoints" / "14.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / "part").write_text("half")
    before = files(copy)
    assert evaluated(copy) == 0
    assert files(copy) == before


def test_only_what_decides_the_trajectory_must_agree(copy):
    with pytest.raises(ValueError, match="belongs to another run .*preset: p_grpo there, grpo here"):
        evaluated(copy, preset="grpo")


def test_nothing_to_evaluate(tmp_path, copy):
    message = r"^no committed checkpoint in \S+/checkpoints: give the --workdir of a run that has saved one$"
    with pytest.raises(FileNotFoundError, match=message):
        evaluated(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match=message):
        evaluated(copy)


def test_a_stop_leaves_no_record(copy):
    (copy / "evaluation_000012.json").unlink()
    before, stop = files(copy), Stop()
    stop.requested = True
    assert evaluated(copy, stop) == 75
    assert files(copy) == before


def test_the_held_out_stream_is_answered_by_the_newest_weights_and_looks_for_a_stop(tmp_path):
    stop, asked = Stop(), []

    class Recorder:
        """Answers at once; asks to stop after the second unit."""

        def rollout(self, weights, work):
            asked.append((weights, work))
            stop.requested = len(asked) == 2
            return dataclasses.replace(units()[work.index % 2], work=work)

    engine = InlineEngine(Recorder())
    learner = types.SimpleNamespace(versions={3: "w"}, offer=lambda step: None)
    parts = Deployment(learner, engine, TwoCandidates(), RunDirectory(tmp_path), stop)
    config = small_config.config(evaluation__num_prompts=12, evaluation__prompts_per_work=4, evaluation__completions_per_prompt=2)
    with pytest.raises(Preempted, match="evaluation"):
        evaluate.evaluation(config, parts, step=3)
    assert asked == [("w", Work(i, 3, 3, "test")) for i in range(2)] and RunDirectory(tmp_path).evaluations() == []
