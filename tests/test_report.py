"""The report: one page without network or scripts, true to the records, safe with hostile text, honest about unfinished runs."""

import html.parser
import pathlib
import re
import subprocess
import sys

import pytest

from pgrpo_jax.report import write_report
from pgrpo_jax.run_directory import RunDirectory

PROGRAM = pathlib.Path(__file__).parent.parent / "launch" / "report.py"
HOSTILE = "<script>alert(1)</script>\"'><img src=https://evil.example/x onerror=alert(2)>&amp;$x_"
VOID = {"meta", "img"}


class Page(html.parser.HTMLParser):
    """Collects the tags and the text of a page and checks that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._open = [], "", []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.text += " " + data


def evaluation(step, rate, gain, name):
    part = {"reward": 0.7 * rate, "answer_rate": rate, "reward_given_answer": 0.66 + gain, "first_candidate_share": 0.3, "num_prompts": 64,
            "advantage_over_random": {"mean": gain, "low": gain - 0.03, "high": gain + 0.03}}
    empty = {key: None for key in part} | {"num_prompts": 3}
    return {"step": step, **part, "intervals": {"reward": {"low": 0.1, "high": 0.2}}, "worst_preference_group": "0", "gap": 0.05,
            "per_preference_group": {"0": {**part, "name": name}, "1": empty}, "baselines": {"random": 0.66, "popular": 0.71}}


def make_run(path, preset="grpo", steps=4, finished=True, text="Fargo", gain=0.05):
    run = RunDirectory(path)
    config = {"preset": preset, "num_steps": 4, "seed": 0, "task.name": text}
    run.write_config(config)
    before, after = evaluation(0, 0.15, 0.0, text), evaluation(steps, 0.95, gain, text)
    run.write_evaluation(before)
    for step in range(1, steps + 1):
        record = {"step": step, "wall_secs": 60.0 * step, "reward": step / 10, "kl": None, "generation_secs": 20.0, "update_secs": 10.0,
                  "checkpoint_secs": 0.0}
        record |= {f"preference_group/{p}/{key}": float(step) for p in (0, 1) for key in ("reward", "advantage_scale", "bias")}
        samples = [{"step": step, "prompt_id": text, "preference_id": 0, "prompt": text, "answer": f"{text} {step}", "reward": 0.5,
                    "advantage": 1.0, "truncated": step == 1}]
        run.write_step(record, samples, [])
    if finished:
        run.write_evaluation(after)
        evaluations = {"before": before, "after": after, "baselines": before["baselines"]}
        run.write_summary({"steps": steps, "wall_secs": 300.0, "evaluation": evaluations,
                           "state_sha256": "abcdef" * 10, "config": config, "reproducible": True})
    return path


def report(runs, out):
    text = write_report(runs, out).read_text()
    return text, Page(text)


def test_two_runs_side_by_side(tmp_path):
    runs = [make_run(tmp_path / "first"), make_run(tmp_path / "second", "p_grpo", gain=0.01)]
    text, page = report(runs, tmp_path / "report.html")
    said = re.sub(r"\s+", " ", page.text)
    for part in ("first", "second", "finished", "preference learned: an answer earns +0.050 [+0.020, +0.080]",
                 "format learned, preference not resolved", "0.150 \u2192 0.950", "0.105 \u2192 0.665 [0.100, 0.200]",
                 "baseline: most popular 0.710", "Fargo 1", "Fargo 4", "1m20s (27%)", "40s (13%)", "0.100 \u2192 0.400",
                 "abcdefabcdefabcd"):
        assert part in said, part
    assert "Fargo 2" not in said
    compared = said[said.index("Only the keys that differ"):said.index("configuration of first")]
    assert '"grpo"' in compared and '"p_grpo"' in compared and "preset" in compared and "num_steps" not in compared
    assert "num_steps" in said[said.index("configuration of first"):]
    assert sum(tag == "details" for tag, _ in page.tags) == 2 + 4  # two configurations, four prompts
    numeric = [attributes for tag, attributes in page.tags if tag == "td" and attributes.get("class") == "n"]
    assert numeric and ".n { text-align: right" in text.replace("th.n, td.n", ".n")


def add_steps(path, records):
    run = RunDirectory(path)
    run.write_config({"preset": "p_grpo", "num_steps": 9})
    for record in records:
        run.write_step({"wall_secs": 1.0} | record, [], [])
    return path


def test_alarms_are_listed_from_beginning_to_end(tmp_path):
    held = {"key": HOSTILE, "since": 2, "value": 0.25, "bound": 0.5, "remedy": "raise it"}
    lasting = {"key": "entropy_collapse", "since": 3, "value": None, "bound": 0.1, "remedy": "stop it"}
    records = [{"step": step, "alarms": alarms} for step, alarms in enumerate([[], [held], [held, lasting], [lasting]], start=1)]
    _, page = report([add_steps(tmp_path / "bad", records), add_steps(tmp_path / "good", records[:1])], tmp_path / "report.html")
    said = re.sub(r"\s+", " ", page.text)
    assert f"{HOSTILE} 2 4 0.250 0.500 raise it" in said and "entropy_collapse 3 still on n/a 0.100 stop it" in said
    assert "good : no alarm" in said


def test_a_run_recorded_before_there_were_alarms_says_nothing_of_them(tmp_path):
    _, page = report([make_run(tmp_path / "run")], tmp_path / "report.html")
    assert "no alarm" not in page.text and "raised at update" not in page.text


def test_new_curves_and_panels_are_drawn_where_they_were_recorded(tmp_path):
    keys = ("worst_reward", "cvar", "gap", "duplicates", "gradient_cosine/min")
    records = [{"step": step, **dict.fromkeys(keys, step / 10)} for step in (1, 2)]
    for record in records:
        record |= {f"preference_group/{p}/{key}": 0.5 for p in (0, 1) for key in ("signal_share", "gradient_share", "entropy")}
    _, page = report([add_steps(tmp_path / "new", records)], tmp_path / "report.html")
    drawn = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert len(drawn) == 8 and any("Reward of the worst preference group" == alt for alt in drawn)
    _, page = report([make_run(tmp_path / "old")], tmp_path / "report.html")
    assert not any("gradient" in attributes["alt"] and "Share" in attributes["alt"] for tag, attributes in page.tags if tag == "img")


def test_the_page_needs_no_network_and_no_scripts(tmp_path):
    _, page = report([make_run(tmp_path / "run")], tmp_path / "report.html")
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "svg"})
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) >= 5
    for attributes in images:
        assert attributes["src"].startswith("data:image/svg+xml;base64,") and attributes["alt"]
    policy = next(attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


def test_hostile_text_stays_text(tmp_path):
    run = make_run(tmp_path / "<b>run", preset=HOSTILE, text=HOSTILE)
    text, page = report([run, make_run(tmp_path / "plain")], tmp_path / "report.html")
    assert "<script" not in text and "<b>run" not in text
    assert {tag for tag, _ in page.tags}.isdisjoint({"script"})
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert all(attributes["src"].startswith("data:") for tag, attributes in page.tags if tag == "img")
    assert page.text.count(HOSTILE) >= 5  # preset, name of the preference group, prompt, prompt id, answer


def test_a_run_without_summary_is_reported_as_such(tmp_path):
    _, page = report([make_run(tmp_path / "run", steps=2, finished=False)], tmp_path / "report.html")
    assert "still running or preempted at update 2 of 4" in page.text and "not evaluated after training" in page.text
    assert "finished" not in page.text


def test_a_run_that_has_only_started_and_one_without_numbers(tmp_path):
    RunDirectory(tmp_path / "started").write_config({"preset": "grpo", "num_steps": 4})
    bare = RunDirectory(tmp_path / "bare")
    bare.write_step({"step": 1}, [], [])
    _, page = report([tmp_path / "started", tmp_path / "bare"], tmp_path / "report.html")
    assert "at update 0 of 4" in page.text and "at update 1 of ?" in page.text


def test_equal_records_make_equal_pages_and_equal_names_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")]
    first, page = report(runs, tmp_path / "1.html")
    second, _ = report(runs, tmp_path / "2.html")
    assert first == second
    assert f"1: {runs[0]}" in page.text and f"2: {runs[1]}" in page.text and "The configurations are equal." in page.text


def test_what_is_not_a_run_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is not a run directory: .* pass the --workdir of a run"):
        write_report([make_run(tmp_path / "run"), tmp_path / "empty"], tmp_path / "report.html")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write_report([tmp_path / "missing"], tmp_path / "report.html")
    with pytest.raises(ValueError, match="0 runs given"):
        write_report([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_the_program_works_from_any_directory(tmp_path):
    RunDirectory(tmp_path / "run").write_config({"preset": "grpo"})
    (tmp_path / "empty").mkdir()

    def launch(*arguments):
        command = [sys.executable, str(PROGRAM), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)

    done = launch("run", "--out=chosen.html")
    assert (done.returncode, done.stdout, done.stderr) == (0, "chosen.html\n", "") and (tmp_path / "chosen.html").exists()
    done = launch("run")
    assert done.returncode == 0 and (tmp_path / "run" / "report.html").read_bytes() == (tmp_path / "chosen.html").read_bytes()
    done = launch("run", "empty")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "empty is not a run directory" in done.stderr
