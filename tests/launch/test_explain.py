"""launch/explain.py on a real run, on files alone, and on what is no record."""

import json
import shutil
import sys

import program

from launch import explain
from pgrpo_jax.rollout_files import find_rollouts
from pgrpo_jax.run_directory import RunDirectory


def run(*arguments):
    return program.run([sys.executable, "launch/explain.py", *map(str, arguments)])


def test_a_run_is_explained_and_its_own_advantages_are_those_it_recorded(undisturbed, tmp_path):
    done = run(undisturbed, f"--out={tmp_path / 'pages' / 'page.html'}", f"--json={tmp_path / 'numbers.json'}", "--top=3")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert lines[0].startswith("Check: the 320 recorded advantages are those recomputed") and lines[-1] == str(tmp_path / "pages" / "page.html")
    assert numbers["check"]["agrees"] is True and numbers["check"]["largest_difference"] <= 1e-6 and numbers["notes"] == []
    assert len(numbers["preference_groups"]) == 3 and len(numbers["correlation"]["schemes"]) == 14
    page = (tmp_path / "pages" / "page.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "Who gets the signal" in page and "/run" not in page
    recorded = [line for line in RunDirectory(undisturbed).metrics() if line["step"] == 40][0]
    signal = numbers["preference_groups"][0]
    assert recorded["preference_group/0/history_count"] > 0 and signal["completions"] > 0


def test_files_alone_have_no_configuration_and_gaps_are_said(undisturbed, tmp_path):
    files = [shutil.copy(find_rollouts(undisturbed)[i], tmp_path) for i in (4, 0, 2)]
    said = explain.explain(files, out=str(tmp_path / "page.html"))
    assert said[0].startswith("steps 2, 4 are not recorded") and said[1].startswith("No config.json is beside the rollouts: cold start below 32")
    assert said[2] == "The recorded advantages were not compared: no configuration of the run was given."


def test_a_scheme_that_the_record_contradicts_is_found_out(undisturbed, tmp_path):
    copy = shutil.copytree(undisturbed, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text()) | {"preset": "grpo"}
    (copy / "config.json").write_text(json.dumps(config))
    assert "DIFFER from those recomputed, first at step" in explain.explain([str(copy)], out=None)[0]
    assert (copy / "explain.html").exists()
    (copy / "config.json").write_text(json.dumps(config | {"algorithm.kl_in": "reward", "algorithm.kl_coefficient": 0.1, "a.key.that.is.gone": 1}))
    assert explain.explain([str(copy)], out=None)[0].startswith("The run paid its KL in the reward, which is not recorded")


def test_what_is_no_record_is_one_line(undisturbed, tmp_path):
    damaged = tmp_path / "step_000001.npz"
    damaged.write_bytes(b"nothing")
    for arguments, word in (
        ([tmp_path / "nowhere", "--out=x"], "nowhere does not exist: give the --workdir of a run"),
        ([damaged, f"--out={tmp_path / 'page.html'}"], "is damaged or no rollouts file"),
        ([damaged], "no run directory is given to write explain.html to: add --out=FILE"),
    ):
        done = run(*arguments)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and word in done.stderr and done.stderr.startswith("error: ")
    assert run().returncode != 0 and not (tmp_path / "page.html").exists()
