"""Sweeps over arms: whoever trains beside whom, and what the report says, against the outcomes themselves."""

import dataclasses

import numpy as np
import pytest
from small_laboratory import BUDGET, GRPO, P_GRPO, SEEDS, WORLDS

from pgrpo_jax.laboratory import comparison, sweep, tables

ARMS = {"grpo": GRPO, "p_grpo": P_GRPO, "stratified": dataclasses.replace(GRPO, share_floor=0.33)}


@pytest.fixture(scope="module")
def outcomes():
    return sweep.run(ARMS, WORLDS, SEEDS, BUDGET)


@pytest.fixture(scope="module")
def report(outcomes):
    return sweep.report(outcomes, WORLDS, BUDGET, tolerance=0.01)


def test_threads_change_nothing(outcomes):
    assert list(outcomes) == list(ARMS)
    one = sweep.run(ARMS, WORLDS, SEEDS, BUDGET, num_threads=1)
    for name in ARMS:
        np.testing.assert_array_equal(one[name].curve, outcomes[name].curve)
    assert outcomes["grpo"].curve.shape == (3, 6, 40, 3)


def test_the_report_is_what_the_outcomes_say(outcomes, report):
    curve = outcomes["stratified"].curve.astype(np.float64)
    worst, base = curve[0, :, -1].min(-1), outcomes["grpo"].curve[0, :, -1].astype(np.float64).min(-1)
    assert report["measures"]["stratified"]["base"]["worst_final"] == dataclasses.asdict(comparison.interval(worst))
    assert report["paired"]["stratified"]["grpo"]["base"]["worst_final"] == dataclasses.asdict(comparison.paired(worst, base))
    early = (curve[:, :, 7, 0] * 0.5 + curve[:, :, 7, 1] * 0.35 + curve[:, :, 7, 2] * 0.15).mean(0)
    assert report["measures"]["stratified"][sweep.ALL]["mean_early"]["mean"] == pytest.approx(early.mean(), abs=1e-7)
    assert set(report["verdicts"]) == {"stratified"} and set(report["verdicts"]["stratified"]) == set(sweep.BASELINES)
    assert report["paired"]["grpo"]["grpo"][sweep.ALL]["mean_final"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    share = report["instruments"]["p_grpo"]["base"]["gradient_share"]
    assert sum(share) == pytest.approx(1.0) and share == pytest.approx(outcomes["p_grpo"].gradient_share[0].mean(0).tolist())


def test_choice_is_by_score_best_first(outcomes):
    floors = {str(x): dataclasses.replace(GRPO, share_floor=x) for x in (0.2, 0.33)}
    options = {"grpo": {"": GRPO}, "stratified": floors}
    scores = sweep.choose(options, (0.1, 1.0), WORLDS, SEEDS, BUDGET)
    assert list(scores) == ["grpo", "stratified"] and len(scores["grpo"]) == 2 and len(scores["stratified"]) == 4
    for each in scores.values():
        assert list(each.values()) == sorted(each.values(), reverse=True)
    found = comparison.measures(outcomes["grpo"].curve, np.asarray([world["shares"] for world in WORLDS.values()]), BUDGET.early_step)
    assert scores["grpo"]["", 1.0] == pytest.approx(comparison.score(found))


def test_tables_show_the_numbers_of_the_report(report):
    cells = [line.split("|")[1:-1] for line in tables.measure(report, "smallest_final").splitlines()]
    assert [cell.strip() for cell in cells[0]] == ["arm", *WORLDS, sweep.ALL]
    one = report["measures"]["p_grpo"]["base"]["smallest_final"]
    assert cells[3][1].strip() == f"{one['mean']:.3f} ±{(one['high'] - one['low']) / 2:.3f}".replace("0.", ".")
    assert len({len(line) for line in tables.summary(report).splitlines()}) == 1  # columns line up
    verdict = report["verdicts"]["stratified"]["p_grpo"]
    assert f"{verdict['worst']['mean']:+.4f} [" in tables.summary(report)
    rows = tables.instruments(report, "grpo").splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == list(WORLDS)
    assert f"{report['instruments']['grpo']['base']['scale'][-1]:.3f}" in rows[0]


def test_the_verdict_names_who_does_or_says_that_none_does(report):
    none = report | {"recommended": None}
    assert tables.verdict(none, tolerance=0.01).startswith("None lifts the worst preference group above both grpo and p_grpo")
    lifting = {base: {"lifts": True} for base in sweep.BASELINES}
    two = report | {"recommended": "a", "verdicts": {"a": lifting, "b": lifting, "c": lifting | {"grpo": {"lifts": False}}}}
    assert tables.verdict(two, tolerance=0.01).startswith("a lifts") and tables.verdict(two, tolerance=0.01).endswith("so do: b.")
