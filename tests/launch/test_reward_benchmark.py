"""Time to reward: peers earn what we do, and a run is watched until it has arrived, ended, or taken too long."""

import importlib.util
import json
import os
import pathlib
import sys
import time

import pytest

from launch.benchmarks import reward
from launch.benchmarks.timing import EndedError
from pgrpo_jax.structs import Prompt
from pgrpo_jax.tasks import movielens

PEERS = pathlib.Path(reward.__file__).resolve().parents[1] / "peers"


def test_a_peer_earns_what_we_earn():
    spec = importlib.util.spec_from_file_location("movielens_reward", PEERS / "movielens_reward.py")
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    facts = {"names": ["alien", "aliens", "die hard|hard one", "heat"], "decoys": ["heat wave"], "ratings": [1, 5, 4, 2]}
    task = movielens.load_judge("", seed=0, num_preference_groups=2)
    earned = {}
    for answer in ("Alien", "I like Aliens", "The HARD one!", "heat and alien", "Heat Wave", "", "alien, again Alien", "Die Hard (1988)"):
        earned[answer] = peer.rating(answer, facts)
        assert earned[answer] == task.reward(Prompt("p", "", 0, facts), answer).total
    assert set(earned.values()) == {0.2, 1.0, 0.8, 0.0}


def test_the_goal_is_a_mean_of_the_newest_updates():
    assert not reward.reached([0.9, 0.9]) and not reward.reached([1.0, 1.0, 0.4, 0.4, 0.4])
    assert reward.reached([0.0, 0.3, 0.5, 0.56]) and not reward.reached([0.9, 0.3, 0.5, 0.5])


def watched(tmp_path, program):
    file = tmp_path / "rewards.jsonl"
    (tmp_path / "run.py").write_text(f"import json, os, subprocess, sys, time\nfile = open({str(file)!r}, 'a', buffering=1)\n{program}")
    return reward.watch([sys.executable, tmp_path / "run.py"], file, log=tmp_path / "log.txt")


def sleeps(pid):
    try:
        return b"sleep" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()  # empty once it has ended
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_run_is_ended_with_its_children_when_it_has_arrived(tmp_path):
    program = f"""
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
open({str(tmp_path / "pid")!r}, 'w').write(str(child.pid))
time.sleep(0.5)
for step, value in enumerate([0.1, 0.2, 0.5, 0.4, 0.5]): file.write(json.dumps({{'step': step, 'reward': value}}) + '\\n')
file.write('{{"step": 6, "rew')
time.sleep(600)
"""
    secs, updates = watched(tmp_path, program)
    assert updates == 5 and 0.5 <= secs < 60
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 20
    while sleeps(child):
        assert time.monotonic() < deadline, f"process {child} is still there"
        time.sleep(0.05)


def test_a_run_that_ends_or_takes_too_long_says_so(tmp_path, monkeypatch):
    with pytest.raises(EndedError, match=r"ended with status 3 after 2 updates, rewards \[0.5, 0.2\] \(out of memory\)"):
        watched(tmp_path, "[file.write(json.dumps({'reward': r}) + '\\n') for r in (0.5, 0.2)]; print('noise'); print('out of memory'); sys.exit(3)")
    monkeypatch.setattr(reward, "RUN_SECS", 1.0)
    with pytest.raises(EndedError, match=r"has not reached a mean reward of 0.45 within 1 s: rewards \[0.5, 0.2\]"):
        watched(tmp_path, "time.sleep(600)")


def test_who_ends_is_left_out_and_ratios_are_of_the_rounds_that_both_have(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(reward, "_MODEL", tmp_path)
    monkeypatch.setattr(reward.peers, "installed", lambda name: (pathlib.Path(sys.executable), tmp_path))
    asked = []

    def start(name):
        def made(directory, seed):
            asked.append((name, seed))
            program = "import json, sys, time; [print(json.dumps({'reward': 1.0}), file=open(sys.argv[1], 'a')) for _ in range(3)]; time.sleep(600)"
            return [sys.executable, "-c", "import sys; sys.exit('full')" if (name, seed) == ("trl", 1) else program, directory / "r"], directory / "r"

        return made

    monkeypatch.setattr(reward, "_STARTS", {name: start(name) for name in ("pgrpo_jax", "trl")})
    found = reward.measure(3, ["trl"])
    assert asked == [("pgrpo_jax", 0), ("trl", 0), ("pgrpo_jax", 1), ("trl", 1), ("pgrpo_jax", 2)]
    ours, theirs = [found.quantities[f"{name}, s to a mean reward of 0.45 over 3 updates"] for name in ("pgrpo_jax", "trl")]
    assert len(ours) == 3 and len(theirs) == 1 and found.quantities["pgrpo_jax / trl, speed"] == [theirs[0] / ours[0]]
    assert found.quantities["trl, updates"] == [3] and found.ended.keys() == {"trl"} and "seed 1: ended with status 1" in found.ended["trl"]


def test_everybody_runs_the_demo(tmp_path, monkeypatch):
    """The same prompts in the same order, and the same sizes."""
    monkeypatch.setattr(reward.peers, "installed", lambda name: (pathlib.Path("python"), tmp_path))
    if not any(reward._MODEL.glob("*.gguf")):
        pytest.skip("needs the demo's model: launch/fetch_assets.py")
    config = reward.movielens.get_config()
    line, file = reward._trl(tmp_path, 3)
    rows = [json.loads(row) for row in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    config.seed = 3
    expected = reward.assembly.load_task(config).prompts("train", 1, config.prompts_per_step)
    assert [row["prompt"] for row in rows[8:16]] == [prompt.text for prompt in expected] and len(rows) == 8 * reward.MOST_UPDATES
    assert all(set(row) == {"prompt", "ids", "names", "decoys", "ratings"} and len(row["ids"]) > 40 for row in rows)
    assert {"--learning_rate=4.5e-05", "--seed=3", "--prompts_per_step=8", "--completions_per_prompt=8", "--new_tokens=16"} <= set(line)
    assert os.fspath(file) == str(tmp_path / "rewards.jsonl")
