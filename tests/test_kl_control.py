"""Coefficients of the KL by hand, and when the reference moves."""

import numpy as np
import pytest

from pgrpo_jax import kl_control
from pgrpo_jax.kl_control import KLControl

START = np.float32([0.1, 0.2, 0.4])
MEASURED = {"kl": np.float32(0.11), "by_preference/kl": np.float32([0.05, np.nan, 0.3])}


def test_one_coefficient_follows_the_kl_of_all():
    """10 % above the target: all rise by a tenth of 1/horizon."""
    found = kl_control.adapted(KLControl(coefficient=0.1, target=0.1, horizon=5.0), START, MEASURED)
    np.testing.assert_allclose(found, START * (1 + 0.1 / 5), rtol=1e-6)
    assert found.dtype == np.float32


def test_each_preference_group_follows_its_own():
    """Half of the target, absent, and three times it: −20 %, nothing, +20 %, over the horizon."""
    found = kl_control.adapted(KLControl(coefficient=0.1, target=0.1, horizon=5.0, scope="preference_group"), START, MEASURED)
    np.testing.assert_allclose(found, START * np.float32([1 - 0.2 / 5, 1, 1 + 0.2 / 5]), rtol=1e-6)


def test_without_a_target_nothing_moves():
    np.testing.assert_array_equal(kl_control.adapted(KLControl(coefficient=0.1), START, MEASURED), START)


@pytest.mark.parametrize("control, steps", [(KLControl(coefficient=0.1, refresh=3), [3, 6]), (KLControl(coefficient=0.1), []), (KLControl(refresh=3), [])])
def test_the_reference_moves_every_so_many_updates(control, steps):
    assert [step for step in range(1, 8) if control.refreshes(step)] == steps


def test_there_is_state_only_where_a_kl_is_paid():
    assert kl_control.initial(KLControl(), 2) == {}
    found = kl_control.initial(KLControl(coefficient=0.25), 2)
    assert list(found) == ["kl_coefficients"]
    np.testing.assert_array_equal(found["kl_coefficients"], np.float32([0.25, 0.25]))
