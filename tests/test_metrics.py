"""What numbers mean: verdicts, the answer to a loss of 0, formats."""

import pytest

from pgrpo_jax import metrics


def evaluation(rate, mean, low, high):
    return {"answer_rate": rate, "advantage_over_random": {"mean": mean, "low": low, "high": high}}


@pytest.mark.parametrize("before, after, expected", [
    (evaluation(0.15, 0.0, -0.1, 0.1), evaluation(0.95, 0.01, -0.02, 0.04), "format learned, preference not resolved"),
    (evaluation(0.15, 0.0, -0.1, 0.1), evaluation(0.30, 0.01, 0.0, 0.04), "format learned, preference not resolved"),  # touches 0
    (evaluation(0.95, 0.0, -0.1, 0.1), evaluation(0.95, 0.01, -0.02, 0.04), "format learned, preference not resolved"),
    (None, evaluation(0.95, -0.01, -0.04, 0.0), "format learned, preference not resolved"),
    (evaluation(0.15, 0.0, -0.1, 0.1), evaluation(0.17, 0.01, -0.02, 0.04), "format not learned, preference not resolved"),
    (evaluation(0.15, 0.0, -0.1, 0.1), evaluation(0.95, 0.05, 0.01, 0.09), "preference learned"),
    (evaluation(0.15, 0.06, 0.02, 0.1), evaluation(0.95, 0.05, 0.01, 0.09), "preference resolved, but no better than before"),
    (evaluation(0.15, 0.06, 0.02, 0.1), evaluation(0.95, 0.15, 0.11, 0.19), "preference learned"),
    (evaluation(0.15, 0.0, -0.1, 0.1), evaluation(0.95, -0.05, -0.09, -0.01), "preference missed"),
    (evaluation(0.15, 0.0, -0.1, 0.1), evaluation(0.0, None, None, None), "nothing can be said: fewer than 2"),
    (None, evaluation(0.01, 0.2, None, None), "nothing can be said: fewer than 2 held-out prompts were answered"),
    (evaluation(0.15, 0.0, -0.1, 0.1), None, "nothing can be said: not evaluated"),
    (None, {"answer_rate": 0.95, "advantage_over_random": None}, "nothing can be said: fewer than 2 held-out prompts were answered"),
])
def test_verdict(before, after, expected):
    assert metrics.verdict(before, after).startswith(expected)


def test_verdict_quotes_its_evidence():
    sentence = metrics.verdict(evaluation(0.15, 0.0, -0.1, 0.1), evaluation(0.95, 0.0512, 0.011, 0.09))
    assert "+0.051 [+0.011, +0.090]" in sentence and "\n" not in sentence


def test_health_answers_a_loss_of_zero_only():
    assert metrics.health({"loss": 0.02, "grad_norm": 1.0}) is None
    assert metrics.health({"loss": None, "grad_norm": 1.0}) is None
    assert metrics.health({}) is None
    assert metrics.health({"loss": -1e-9, "grad_norm": 0.7}).startswith("a loss near 0 is expected")
    assert metrics.health({"loss": 1e-9}).startswith("a loss near 0 is expected")
    dead = metrics.health({"loss": 0.0, "grad_norm": 0.0, "dead_prompts": 1.0})
    assert "taught nothing" in dead and "1.00" in dead
    clipped = metrics.health({"loss": 1e-5, "grad_norm": 0.1, "clip_fraction": 0.995})
    assert "100% of the tokens are clipped" in clipped or "99% of the tokens are clipped" in clipped


NOTHING = {
    "loss": 0.0, "grad_norm": 0.0, "reward": 0.5, "length": 7.0, "truncated": 0.25, "correction/weight": 1.0, "clip_fraction": 0.0,
    "informative_prompts": 0.5, "reward_std": 0.3, "advantage_std": 0.8, "advantage_mean": 0.0, "dead_prompts": 0.25,
}  # fmt: skip


@pytest.mark.parametrize("changes, said", [
    ({"reward": None, "length": None}, "no completion was left"), ({"length": 0.0, "truncated": 0.0}, "every completion is empty"),
    ({"truncated": 1.0}, "every completion ran out of tokens"), ({"correction/weight": 0.0}, "importance correction dropped every token"),
    ({"clip_fraction": 1.0}, "every token is clipped"),
    ({"informative_prompts": 0.0, "reward_std": 0.0, "correction/weight": 0.0}, "no prompt was informative"),
    ({"reward_std": 0.0, "reward": 1.0}, "every reward of the step is 1.000"), ({"advantage_std": 0.0}, "every advantage is 0"),
    ({}, "0.25"),
])
def test_health_names_the_cause_of_no_gradient(changes, said):
    sentence = metrics.health(NOTHING | changes)
    assert sentence.startswith("loss and gradient are 0: this step taught nothing") and said in sentence and "\n" not in sentence
    far = metrics.health(NOTHING | changes | {"loss": -0.4})
    assert far == sentence.replace("loss and gradient are", "the gradient is")
    assert metrics.health(NOTHING | changes | {"loss": None}) == sentence


def test_equal_advantages_that_are_not_zero_are_no_cause():
    """Under p_grpo all may be 1 and train."""
    assert "every advantage is 0" not in metrics.health(NOTHING | {"advantage_std": 0.0, "advantage_mean": 1.0})


@pytest.mark.parametrize("value, digits, signed, expected", [
    (0.12345, 3, False, "0.123"), (0.12345, 2, True, "+0.12"), (-2, 1, True, "-2.0"),
    (None, 3, False, "n/a"), (float("nan"), 3, False, "n/a"),
    (float("inf"), 3, False, "n/a"), (True, 3, False, "n/a"), ("0.5", 3, False, "n/a"),
])
def test_number(value, digits, signed, expected):
    assert metrics.number(value, digits, signed) == expected


def test_interval_needs_both_ends():
    assert metrics.interval({"low": -0.01, "high": 0.2}) == "[-0.010, +0.200]"
    assert metrics.interval({"low": -0.01, "high": None}) == metrics.interval(None) == ""


@pytest.mark.parametrize("secs, expected", [(0, "0s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m"), (-3, "0s")])
def test_duration(secs, expected):
    assert metrics.duration(secs) == expected


def test_preference_numbers_are_ordered_as_numbers():
    record = {"preference_group/10/reward": 0.0, "preference_group/2/reward": 0.0, "preference_group/2/bias": 0.0, "reward": 0.0}
    assert metrics.preference_groups(record) == ["2", "10"]
    parts = {"10": {"name": "drama"}, "2": {"name": None}, "3": {"name": "3"}}
    rows = metrics.evaluation_rows({"reward": 1.0, "per_preference_group": parts})
    assert [label for label, _ in rows] == ["all", "2", "3", "10 drama"]


def test_spread_keeps_both_ends():
    samples = [{"advantage": value} for value in (3.0, -1.0, 0.0, None, 7.0, -5.0, 1.0)]
    assert [sample["advantage"] for sample in metrics.spread(samples, 3)] == [7.0, 0.0, -5.0]
    assert [sample["advantage"] for sample in metrics.spread(samples[:2], 5)] == [3.0, -1.0]
    assert [sample["advantage"] for sample in metrics.spread(samples, 1)] == [7.0]
    assert metrics.spread([], 3) == []
