"""The laboratory's program from outside."""

import json
import sys

import program


def laboratory(*arguments, cwd=program.ROOT):
    return program.run([sys.executable, str(program.ROOT / "launch" / "laboratory.py"), *arguments], cwd=cwd)


def test_what_is_wrong_is_one_line():
    assert program.errors(laboratory("train")) == ["command 'train' is unknown: give one of arms, choose, follow_up, off_policy"]
    found = program.errors(laboratory("arms", "--only=ppo"))
    assert len(found) == 1 and found[0].startswith("arm 'ppo' is unknown: give one of grpo; dr_grpo; ")


def test_arms_prints_tables_and_leaves_a_report_and_charts(tmp_path):
    done = laboratory("arms", "--seeds=2", "--only=grpo", f"--out={tmp_path / 'out'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["measures"]) == ["grpo", "p_grpo"] and len(report["measures"]["grpo"]) == 12
    for chart in ("differences.png", "curves.png"):
        assert (tmp_path / "out" / chart).read_bytes().startswith(b"\x89PNG")
    lines = done.stdout.splitlines()
    assert {"smallest, early", "smallest, final", "mean, early", "mean, final"} <= set(lines)
    assert lines[-1].startswith("2 arms, 11 regimes, 2 seeds: ")
    assert any("the worst preference group above both grpo and p_grpo" in line for line in lines)
