"""A run without one user, and under another assignment of users: histories, samples and rollouts, and it goes on; what can not be exact is refused."""

import json
import shutil

import jax
import numpy as np
import pytest
import small_config

from launch import histories as program
from pgrpo_jax import histories, policies
from pgrpo_jax.preemption import EXIT_PREEMPTED, Stop
from pgrpo_jax.rollout_files import find_rollouts, load_rollouts, pack_rollouts
from pgrpo_jax.run_directory import RunDirectory
from pgrpo_jax.structs import RewardFailure
from pgrpo_jax.train import train

CHANGES = {"num_steps": 6, "staleness__accept": 2, "curation__overlong_buffer": 2, "curation__overlong_penalty": 0.25}
CHANGES |= {"algorithm__staleness_half_life": 2.0}


pytestmark = pytest.mark.usefixtures("standard_promotion")


class StopAfter(Stop):
    """Asks to stop once a number of updates is on record."""

    def __init__(self, workdir, count):
        super().__init__()
        self._workdir, self._count = workdir, count

    def check(self, phase):
        self.requested = len(RunDirectory(self._workdir).metrics()) >= self._count
        super().check(phase)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after its fourth update; answers near the limit are punished, stale rewards weigh less."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    config, identity = small_config.config(**CHANGES), small_config.identity(**CHANGES)
    assert train(config, identity=identity, workdir=workdir, stop=StopAfter(workdir, 4)) == EXIT_PREEMPTED
    assert RunDirectory(workdir).metrics()[-1]["step"] == 4
    return workdir


def opened(workdir, **changes):
    changes = CHANGES | changes
    config, identity = small_config.config(**changes), small_config.identity(**changes)
    return policies.restore(config, identity=identity, run=workdir), identity


def units(workdir):
    return [(int(file.name[5:11]), unit) for file in find_rollouts(workdir) for unit in load_rollouts(file)]


def expected(workdir, row_of, num_rows, leave_out=()):
    """[(Σ w, mean, m2)] of each row by plain loops over the records, shaped and weighed as the configuration says."""
    parts = [[] for _ in range(num_rows)]
    for step, unit in units(workdir):
        for p, reward, length in zip(unit.prompt_index, unit.rewards, unit.completion_lengths):
            prompt = unit.prompt_records[p]
            if prompt.user_id not in leave_out:
                weight = 2.0 ** (-(step - 1 - unit.work.version) / 2.0)
                parts[row_of(prompt)].append((weight, float(reward) - 0.25 * min(max((length - 2) / 2, 0), 1)))
    found = []
    for part in parts:
        weight = sum(w for w, _ in part)
        mean = sum(w * r for w, r in part) / weight if part else 0.0
        found.append((len(part), weight, mean, sum(w * (r - mean) ** 2 for w, r in part)))
    return found


def assert_history(history, wanted):
    for row, (count, weight, mean, m2) in enumerate(wanted):
        assert history.count[row] == count
        assert history.count[row] * history.weight[row] == pytest.approx(weight, rel=1e-4)
        assert history.mean[row] == pytest.approx(mean, rel=1e-3, abs=1e-5) and history.m2[row] == pytest.approx(m2, rel=5e-3, abs=1e-4)


def a_user(workdir):
    """One whose rewards share a row with others'."""
    first = units(workdir)[0][1].prompt_records[0]
    others = [p for _, unit in units(workdir) for p in unit.prompt_records if p.user_id != first.user_id and p.history_row == first.history_row]
    assert others
    return first.user_id


def test_a_user_is_taken_out_of_histories_and_records_and_the_run_goes_on(stopped, tmp_path):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    user, new = a_user(stopped), tmp_path / "new"
    saved, identity = opened(stopped)
    assert_history(saved.history, expected(stopped, lambda p: p.history_row, 3))
    count = histories.forget(saved, user, new, identity=identity)
    assert count == sum(unit.prompt_records[p].user_id == user for _, unit in units(stopped) for p in unit.prompt_index)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before

    changed, _ = opened(new)
    assert_history(changed.history, expected(stopped, lambda p: p.history_row, 3, leave_out={user}))
    for name in ("trainable", "optimiser", "objective"):
        for a, b in zip(jax.tree.leaves(getattr(changed.learner.state, name)), jax.tree.leaves(getattr(saved.learner.state, name)), strict=True):
            np.testing.assert_array_equal(a, b)
    assert not any(user.encode() in path.read_bytes() for path in new.rglob("*") if path.is_file())
    gone = {p.prompt_id for _, unit in units(stopped) for p in unit.prompt_records if p.user_id == user}
    kept = [sample for sample in RunDirectory(stopped).samples() if sample["prompt_id"] not in gone]
    assert RunDirectory(new).samples() == kept and len(kept) == len(RunDirectory(stopped).samples()) - count
    assert sum(len(unit.rewards) for _, unit in units(new)) == len(kept)
    assert RunDirectory(new).metrics() == RunDirectory(stopped).metrics() and len(RunDirectory(new).evaluations()) == 1
    histories.recorded_parts(changed)  # what is left is what its histories were made of
    assert train(small_config.config(**CHANGES), identity=identity, workdir=new, stop=Stop()) == 0
    assert RunDirectory(new).summary()["steps"] == 6


def test_users_are_dealt_to_other_preference_groups(stopped, tmp_path):
    saved, _ = opened(stopped)
    config, identity = small_config.config(**CHANGES | {"algorithm__arm": "placebo"}), small_config.identity(**CHANGES | {"algorithm__arm": "placebo"})
    histories.migrate(saved, config, tmp_path / "new", identity=identity)
    rows = {p.user_id: p.history_row for _, unit in units(tmp_path / "new") for p in unit.prompt_records}
    assert any(rows[p.user_id] != p.history_row for _, unit in units(stopped) for p in unit.prompt_records)
    changed, _ = opened(tmp_path / "new", algorithm__arm="placebo")
    assert_history(changed.history, expected(stopped, lambda p: rows[p.user_id], 3))
    assert_history(changed.history, expected(tmp_path / "new", lambda p: p.history_row, 3))
    assert train(config, identity=identity, workdir=tmp_path / "new", stop=Stop()) == 0


def test_rows_of_failed_rewards_follow_their_prompts(stopped):
    unit = units(stopped)[0][1]
    failed = tuple(RewardFailure(row, f"row {row}", "zero") for row in range(4))
    one, two = (p.user_id for p in unit.prompt_records)
    changed = histories._without(histories.dataclasses.replace(unit, reward_failures=failed), one)
    assert [(f.row, f.reason) for f in changed.reward_failures] == [(0, "row 2"), (1, "row 3")] and [p.user_id for p in changed.prompt_records] == [two]
    np.testing.assert_array_equal(changed.completions, unit.completions[2:])
    assert histories._without(unit, "nobody").prompt_records == unit.prompt_records


@pytest.mark.parametrize("case", ["unknown user", "in use", "lost records", "memory", "reward kl"])
def test_what_would_not_be_exact_is_refused(case, stopped, tmp_path):
    run, message = stopped, "has no rewards among those of"
    if case == "lost records":
        run, message = shutil.copytree(stopped, tmp_path / "run"), "in the checkpoint, .* in the records.*: the rollouts of"
        file = find_rollouts(run)[1]
        file.write_bytes(pack_rollouts(load_rollouts(file)[:1]))
    saved, identity = opened(run)
    if case == "memory":
        saved.config.update_from_flattened_dict({"algorithm.memory": "ema", "algorithm.memory_length": 8.0})
        message = "algorithm.memory = 'ema' has faded or dropped rewards"
    if case == "reward kl":
        saved.config.update_from_flattened_dict({"algorithm.kl_in": "reward", "algorithm.kl_coefficient": 0.1})
        message = "takes a KL off the rewards that is not recorded"
    if case == "in use":
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "file").write_text("")
        message = "is in use: give a new directory"
    with pytest.raises(ValueError, match=message):
        histories.forget(saved, "nobody" if case == "unknown user" else a_user(stopped), tmp_path / "new", identity=identity)
    assert not (tmp_path / "new" / "checkpoints").exists()


def test_the_program_shows_and_forgets(stopped, tmp_path, capsys):
    run = shutil.copytree(stopped, tmp_path / "run")
    assert program.main(["show", str(run)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "histories after 4 updates" and len(said) == 5
    rewards = sum(len(unit.rewards) for _, unit in units(run))
    assert sum(int(line.split()[1]) for line in said[2:]) == rewards
    said = program.run("forget", str(run), user=a_user(run), out=str(tmp_path / "new"))
    assert "The weights were trained on his answers and still are" in said[1]
    assert program.main(["migrate", str(run), "--arm=pooled", f"--out={tmp_path / 'pooled'}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert int(said[1].split()[1]) == rewards and said[-1].endswith("and --config.algorithm.arm=pooled")
    assert program.main(["forget", str(tmp_path), "--user=x", "--out=y"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'config.json'} does not exist")
    (run / "config.json").write_text(json.dumps({"seed": "many"}))
    with pytest.raises(ValueError, match="is no configuration"):
        program.run("show", str(run))
