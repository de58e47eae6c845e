"""The committed file of the laboratory: what is chosen is among the options, and is chosen on other seeds than are reported."""

from configs import laboratory
from pgrpo_jax.laboratory import environment, sweep


def test_choices_are_among_the_options():
    assert list(laboratory.CHOSEN) == list(laboratory.OPTIONS) == list(laboratory.ARMS)
    for name, (option, rate) in laboratory.CHOSEN.items():
        assert option in laboratory.OPTIONS[name] and rate in laboratory.LEARNING_RATES, name
        assert laboratory.ARMS[name].learning_rate == rate
    assert {*sweep.BASELINES, *laboratory.DRAWN} <= set(laboratory.ARMS)


def test_what_is_reported_was_not_chosen_on():
    assert not set(laboratory.CHOICE_SEEDS) & set(laboratory.REPORT_SEEDS)
    assert not set(laboratory.FOLLOW_UP_SEEDS) & {*laboratory.CHOICE_SEEDS, *laboratory.REPORT_SEEDS}
    assert len(laboratory.CHOICE_SEEDS) >= 200 and len(laboratory.REPORT_SEEDS) >= 200


def test_regimes_are_worlds_whose_minority_is_last():
    regimes = environment.stack(list(laboratory.FOLLOW_UP_REGIMES.values()))
    assert regimes.shares.shape[0] >= 6
    for name, world in laboratory.REGIMES.items():
        assert min(world["shares"]) == world["shares"][-1], name
    budget = laboratory.BUDGET
    assert budget.early_step == budget.num_steps // 5
