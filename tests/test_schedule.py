"""The schedule against its table and brute force."""

import pytest

from pgrpo_jax.schedule import Schedule

SCHEDULES = [(1, 1, None), (1, 2, None), (1, 5, 3), (2, 4, None), (3, 7, 4), (4, 4, None), (4, 8, None), (4, 9, 5), (16, 32, None)]


@pytest.mark.parametrize(
    "reload, accept, version",
    [
        (1, 1, lambda s: s),
        (1, 2, lambda s: max(0, s - 1)),
        (16, 16, lambda s: 16 * (s // 16)),
        (16, 32, lambda s: max(0, 16 * (s // 16) - 16)),  # one window behind
    ],
)
def test_the_table_of_versions(reload, accept, version):
    schedule = Schedule(reload=reload, accept=accept)
    assert [schedule.version(s) for s in range(100)] == [version(s) for s in range(100)]


@pytest.mark.parametrize("reload, accept, lag", SCHEDULES)
def test_versions_are_published_admissible_and_never_of_the_future(reload, accept, lag):
    schedule = Schedule(reload=reload, accept=accept, lag=lag)
    versions = [schedule.version(s) for s in range(200)]
    assert versions == sorted(versions)
    for step, version in enumerate(versions):
        assert schedule.publishes(version) and 0 <= step - version < accept
    assert [s for s in range(40) if schedule.publishes(s)] == list(range(0, 40, reload))


@pytest.mark.parametrize("reload, accept, lag", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 7, 40])
def test_needed_is_what_later_steps_are_generated_with(reload, accept, lag, num_steps):
    schedule = Schedule(reload=reload, accept=accept, lag=lag)
    for step in range(num_steps + 1):
        brute = sorted({schedule.version(s) for s in range(step, num_steps)} & set(range(step + 1)))
        assert schedule.needed(step, num_steps) == tuple(brute)


@pytest.mark.parametrize("reload, accept", [(1, 1), (1, 2), (4, 4), (4, 8), (4, 6)])
def test_the_default_lag(reload, accept):
    assert Schedule(reload=reload, accept=accept).lag == min(accept - reload, reload)


@pytest.mark.parametrize(
    "reload, accept, lag, message",
    [
        (0, 1, None, "staleness.reload = 0 is below 1: "),
        (2, 1, None, "staleness.accept = 1 is below staleness.reload = 2: .* set accept >= reload"),
        (1, 2, 2, r"staleness.lag = 2 is outside \[0, accept - reload = 1\]: "),
        (1, 2, -1, r"staleness.lag = -1 is outside \[0, accept - reload = 1\]: "),
    ],
)
def test_bounds(reload, accept, lag, message):
    with pytest.raises(ValueError, match=message):
        Schedule(reload=reload, accept=accept, lag=lag)


@pytest.mark.parametrize("reload, accept, lag", SCHEDULES)
def test_admits_what_is_fresh_and_not_of_the_future(reload, accept, lag):
    schedule = Schedule(reload=reload, accept=accept, lag=lag)
    admitted = [version for version in range(40) if schedule.admits(20, version)]
    assert admitted == list(range(max(0, 20 - accept + 1), 21))
    assert all(schedule.admits(s, schedule.version(s)) for s in range(100))


@pytest.mark.parametrize("reload, accept", [(1, 1), (1, 4), (4, 4), (4, 9), (1, 0), (4, 0)])
def test_freshest_takes_the_newest_version(reload, accept):
    schedule = Schedule(reload=reload, accept=accept, policy="freshest")
    for step in range(40):
        newest = max(v for v in range(step + 1) if schedule.publishes(v))
        assert schedule.version(step) == schedule.newest(step) == newest and schedule.admits(step, newest)
        assert schedule.needed(step, 40) == (newest,)
        assert [v for v in range(60) if schedule.admits(step, v)] == [v for v in range(step + 1) if accept == 0 or step - v < accept]
    assert schedule.needed(40, 40) == ()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"policy": "newest"}, "staleness.policy = 'newest' is unknown: use one of deterministic, freshest"),
        ({"accept": 0}, "staleness.accept = 0 .* can not be scheduled: set accept >= reload, or staleness.policy to 'freshest'"),
        ({"accept": -1}, "staleness.accept = -1 is below staleness.reload = 1: "),
        ({"accept": -1, "policy": "freshest"}, "staleness.accept = -1 is below staleness.reload = 1: "),
        ({"accept": 3, "reload": 4, "policy": "freshest"}, "staleness.accept = 3 is below staleness.reload = 4: "),
        ({"accept": 3, "lag": 1, "policy": "freshest"}, "staleness.lag = 1 has no place in staleness.policy = 'freshest': leave it unset"),
    ],
)
def test_bounds_of_the_policies(changes, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**changes)
