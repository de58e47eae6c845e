"""What a person sees: one plain line a step away from a terminal, nothing wider than 80 columns on one, and no text that steers it."""

import io
import re

import pytest

from pgrpo_jax.console import Console

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def record(step, **changes):
    values = {
        "step": step, "wall_secs": 100.0 + 30.0 * step, "reward": 0.5123, "answered": 0.75, "advantage_scale": 1.25, "advantage_bias": -0.5,
        "kl": 0.00123, "clip_fraction": 0.01, "entropy": 1.5, "loss": 0.25, "grad_norm": 0.75, "length": 9.25, "truncated": 0.125,
        "tokens_per_sec": 812.4, "generation_secs": 6.1, "update_secs": 4.2,
        "preference_group/10/reward": 0.9, "preference_group/2/reward": None}
    return values | changes


def sample(advantage, answer="Fargo (1996)", prompt="Which film?"):
    return {"step": 5, "prompt_id": "u", "preference_id": 3, "prompt": prompt, "answer": answer, "reward": 0.8, "advantage": advantage,
            "truncated": False}


def evaluation(rate, gain):
    values = {"reward": 0.7 * rate, "answer_rate": rate, "reward_given_answer": 0.7 if rate else None, "first_candidate_share": 0.25,
              "advantage_over_random": {"mean": gain, "low": gain - 0.1, "high": gain + 0.1} if rate else None, "num_prompts": 64}
    parts = {"0": {**values, "name": "a very long name of a preference group indeed"}, "1": values}
    return {"step": 0, **values, "per_preference_group": parts,
            "worst_preference_group": "1", "gap": 0.05, "intervals": {}, "baselines": {"random": 0.66, "popular": 0.71}}


def shown(records, stream=None, samples=(), **options):
    stream = stream or io.StringIO()
    with Console(10, stream=stream, **options) as console:
        for values in records:
            console.step(values, samples)
    return stream.getvalue()


def test_a_step_is_one_plain_line_with_every_number(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "40")
    text = shown([record(3)])
    assert text.count("\n") == 1 and "\x1b" not in text
    styled = shown([record(5)], samples=[sample(1.0)])  # a table is bold where escape codes are allowed
    assert "Fargo (1996)" in styled and "\x1b" not in styled
    for part in ("step 3/10", "reward 0.512 (2:n/a 10:0.90)", "answered 0.75", "scale 1.25 bias -0.50", "kl 0.0012", "clip 0.01",
                 "entropy 1.50", "loss +0.2500", "grad 0.750", "length 9.2", "truncated 0.12", "812 tok/s",
                 "generate 6.1s update 4.2s", "left ?"):
        assert part in text, part


def test_time_left_is_the_median_step_times_the_steps_left():
    walls = [100.0, 160.0, 190.0, 220.0, 250.0]  # the first step compiles: 60 s, then 30 s each
    lines = shown([record(i + 1, wall_secs=wall) for i, wall in enumerate(walls)]).splitlines()
    assert lines[-1].endswith("left 2m30s")


def test_a_terminal_gets_a_bar_and_lines_of_its_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    text = shown([record(5)], stream, samples=[sample(1.0, "word " * 60, "word " * 60)])
    assert "\x1b[" in text and "5/10" in text
    lines = re.split(r"[\r\n]", ESCAPES.sub("", text))
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("    ") and "entropy 1.50" in line for line in lines)


@pytest.mark.parametrize("rate", [0.95, 0.0])
def test_the_evaluation_fits_80_columns(rate):
    stream = io.StringIO()
    with Console(10, stream=stream) as console:
        console.evaluation(evaluation(0.15, 0.0), evaluation(rate, 0.02))
    table, _, sentences = stream.getvalue().partition("baselines")
    assert max(map(len, table.splitlines())) <= 80 and "\x1b" not in table
    assert "random choice 0.660, most popular candidate 0.710" in sentences and "worst preference group 1" in sentences
    if rate:
        for part in ("0.15->0.95", "+0.00->+0.02", "[-0.080, +0.120]", "0.25->0.25"):
            assert table.count(part) == 3, part
        assert "format learned, preference not resolved" in sentences
    else:
        assert "0.15->0.00" in table and "n/a" in table and "nothing can be said" in sentences


def test_the_evaluation_before_training_has_no_verdict():
    stream = io.StringIO()
    with Console(10, stream=stream) as console:
        console.evaluation(evaluation(0.15, 0.0), None)
        console.evaluation(None, None)
    assert "0.15" in stream.getvalue() and "->" not in stream.getvalue() and "resolved" not in stream.getvalue()


def test_samples_come_every_few_steps_and_show_both_ends():
    samples = [sample(float(i), answer=f"answer{i}") for i in range(9)]
    assert "answer" not in shown([record(4, answered=None)], samples=samples).replace("answered", "")
    text = shown([record(5)], samples=samples)
    assert "answer8" in text and "answer0" in text and "+8.00" in text and "0.80" in text
    assert text.index("answer8") < text.index("answer0") and text.count("Which film?") == 4
    assert "answer8" not in shown([record(5)], samples=samples, samples_every=0)


def test_answers_can_not_steer_a_terminal_nor_rich():
    text = shown([record(5)], samples=[sample(1.0, "\x1b[2J\x07[bold red]x[/nothing]\r\n\u202ey", "[/] \x9b31m end")])
    assert not set(text) & set("\x1b\x07\r\x9b\u202e")
    assert "[bold" in text and "[/nothing]" in text


def test_a_stream_that_can_not_write_a_letter_gets_a_question_mark():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with Console(10, stream=stream) as console:
        console.step(record(5), [sample(1.0, "Misérables")])
        console.evaluation(evaluation(0.15, 0.0), evaluation(0.9, 0.0))
        console.note("resumé")
    stream.flush()
    assert b"Mis?rables" in raw.getvalue() and b"resum?" in raw.getvalue()


def test_a_loss_of_zero_is_explained_once():
    text = shown([record(step, loss=1e-9) for step in (1, 2, 3)])
    assert text.count("a loss near 0 is expected") == 1
    text = shown([record(1, loss=1e-9), record(2, loss=0.0, grad_norm=0.0, dead_prompts=1.0)])
    assert "taught nothing" in text


def alarm(key, since=3):
    return {"key": key, "since": since, "value": 0.5, "bound": 0.25, "remedy": "do this"}


def test_an_alarm_is_shown_when_it_begins_and_when_it_ends():
    steps = [[], [alarm("a")], [alarm("a"), alarm("b", 4)], [alarm("a")], [], [alarm("a", 9)]]
    lines = shown([record(step + 2, alarms=held) for step, held in enumerate(steps)]).splitlines()
    said = [line.strip() for line in lines if "alarm" in line]
    assert said == [
        "alarm: a since step 3: 0.500 (bound 0.250): do this", "alarm: b since step 4: 0.500 (bound 0.250): do this", "alarm over: b",
        "alarm over: a", "alarm: a since step 9: 0.500 (bound 0.250): do this",
    ]  # fmt: skip
