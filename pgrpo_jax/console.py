"""Floor 5: what a person sees of a run while it runs. The only module that knows rich.

On a terminal a progress bar with the time left stays below the lines; elsewhere the same lines come out plain, one for each step, with
no escape codes. Text of the model and of the data is shown as it is but for control characters, which could steer a terminal.
"""

import statistics
import sys
from typing import Any, Mapping, Sequence, TextIO

from rich import box
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from pgrpo_jax import alarms, metrics

_PLAIN_WIDTH = 80
_SAMPLES_SHOWN = 4
_PROMPT_TAIL = 140
_ANSWER_HEAD = 200


class Console:
    """Shows a run: a bar, one line a step, tables of samples, the evaluation. Use it as a context manager.

    Args:
        num_steps: updates in the whole run.
        start_step: updates already done (a resumed run).
        samples_every: updates between two tables of samples; 0 shows none.
        stream: where to write; standard output by default.
    """

    def __init__(self, num_steps: int, *, start_step: int = 0, samples_every: int = 5, stream: TextIO | None = None):
        stream = stream or sys.stdout
        self._num_steps, self._samples_every = num_steps, samples_every
        self._live = stream.isatty()
        if self._live:
            self._rich = RichConsole(file=stream, highlight=False)
        else:  # said outright: rich would take FORCE_COLOR or a notebook's variables for a terminal
            self._rich = RichConsole(file=stream, highlight=False, force_terminal=False, color_system=None, width=_PLAIN_WIDTH)
        self._walls: list[float] = []
        self._health: str | None = None
        self._alarms: set[str] = set()
        columns = (SpinnerColumn(), TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None), TimeElapsedColumn(),
                   TextColumn("left {task.fields[left]}"))
        self._bar = Progress(*columns, console=self._rich, refresh_per_second=2, disable=not self._live)
        self._task = self._bar.add_task("step", total=num_steps, completed=start_step, left="?")

    def __enter__(self) -> "Console":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        """Prints one remark, for example where a run was resumed."""
        self._print(text)

    def step(self, record: Mapping[str, Any], samples: Sequence[Mapping[str, Any]] = ()) -> None:
        """Shows one update: its line, the time left, an answer to a loss of 0, alarms that begin or end and, every few steps, samples.

        Args:
            record: the step's metrics (docs/metrics.md).
            samples: the step's samples, as recorded.
        """
        self._walls = [*self._walls[-10:], metrics.finite(record.get("wall_secs")) or 0.0]
        left = self._time_left(int(record["step"]))
        self._bar.update(self._task, completed=int(record["step"]), left=left)
        self._print(self._packed(_step_fields(record, self._num_steps) + [f"left {left}"]))
        health = metrics.health(record)
        if health is not None and health != self._health:
            self._health = health
            self._print(f"  note: {health}")
        held = {alarm["key"]: alarm for alarm in record.get("alarms") or ()}
        for key in sorted(held.keys() - self._alarms):
            self._print(f"  alarm: {alarms.sentence(held[key])}", style="bold")
        for key in sorted(self._alarms - held.keys()):
            self._print(f"  alarm over: {key}")
        self._alarms = set(held)
        if samples and self._samples_every and int(record["step"]) % self._samples_every == 0:
            self._rich.print(self._samples_table(int(record["step"]), samples))

    def evaluation(self, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> None:
        """Shows the evaluation before -> after for each preference group, the baselines and what was learned.

        Args:
            before: evaluation record of the untrained policy; None where it was not evaluated.
            after: evaluation record of the trained policy; None shows `before` alone, without a verdict.
        """
        shown = after or before
        if shown is None:
            return
        self._rich.print(self._evaluation_table(before, after))
        baselines = shown.get("baselines") or {}
        self._print(f"baselines, reward of an answer: random choice {metrics.number(baselines.get('random'))}, "
                    f"most popular candidate {metrics.number(baselines.get('popular'))}; "
                    f"of the policy: {metrics.number(shown.get('reward_given_answer'))}")
        self._print(f"worst preference group {shown.get('worst_preference_group')}, gap between best and worst "
                    f"{metrics.number(shown.get('gap'))} reward")
        if after is not None:
            self._print(metrics.verdict(before, after), style="bold")

    def _time_left(self, step: int) -> str:
        gaps = [later - earlier for earlier, later in zip(self._walls, self._walls[1:])]
        return metrics.duration(statistics.median(gaps) * (self._num_steps - step)) if gaps else "?"

    def _packed(self, fields: Sequence[str]) -> str:
        """Joins fields; on a terminal into lines that fit its width, continued lines indented; elsewhere into one line."""
        lines = [fields[0]]
        for field in fields[1:]:
            if self._live and len(lines[-1]) + 2 + len(field) > self._rich.width:
                lines.append("    " + field)
            else:
                lines[-1] += "  " + field
        return "\n".join(lines)

    def _print(self, text: str, style: str | None = None) -> None:
        # soft_wrap: rich must not break lines that a program may search.
        self._rich.print(Text(self._safe(text, newlines=True), style=style or ""), soft_wrap=True)

    def _safe(self, text: str, newlines: bool = False) -> str:
        """Returns text without control characters and without what the stream's encoding lacks."""
        kept = "".join(c if c.isprintable() or (newlines and c == "\n") else " " for c in text)
        return kept.encode(self._rich.encoding, "replace").decode(self._rich.encoding)

    def _samples_table(self, step: int, samples: Sequence[Mapping[str, Any]]) -> Table:
        table = Table(title=f"samples of step {step}, highest advantage first", box=box.SIMPLE_HEAD, title_justify="left", expand=True)
        table.add_column("prompt ends", ratio=5, overflow="fold")
        table.add_column("answer", ratio=4, overflow="fold")
        for name in ("pref", "reward", "adv"):
            table.add_column(name, justify="right", no_wrap=True)
        for sample in metrics.spread(samples, _SAMPLES_SHOWN):
            answer = self._safe(sample["answer"])[:_ANSWER_HEAD] + (" [truncated]" if sample.get("truncated") else "")
            table.add_row(Text("..." + self._safe(sample["prompt"]).rstrip()[-_PROMPT_TAIL:]), Text(answer), str(sample["preference_id"]),
                          metrics.number(sample["reward"], 2), metrics.number(sample["advantage"], 2, signed=True))
        return table

    def _evaluation_table(self, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> Table:
        title = "held-out evaluation, before -> after" if before and after else "held-out evaluation"
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
        table.add_column("preference", overflow="fold")
        for name in ("n", "answered", "reward", "over random,\n95 % interval", "first\ncandidate"):
            table.add_column(name, justify="right", no_wrap=True)
        old = dict(metrics.evaluation_rows(before)) if before else {}
        new = dict(metrics.evaluation_rows(after)) if after else {}
        for label in new or old:
            first, last = old.get(label), new.get(label)
            shown = last or first
            gain = shown.get("advantage_over_random")
            over = f"{_change(first, last, 'advantage_over_random', signed=True)}\n{metrics.interval(gain)}".strip()
            table.add_row(Text(self._safe(label)), str(shown.get("num_prompts", "")), _change(first, last, "answer_rate"),
                          _change(first, last, "reward"), over, _change(first, last, "first_candidate_share"))
        return table


def _change(first: Mapping[str, Any] | None, last: Mapping[str, Any] | None, key: str, signed: bool = False) -> str:
    values = [record.get(key) for record in (first, last) if record is not None]
    values = [value.get("mean") if isinstance(value, Mapping) else value for value in values]
    return "->".join(metrics.number(value, 2, signed) for value in values)


def _step_fields(record: Mapping[str, Any], num_steps: int) -> list[str]:
    def show(key: str, digits: int, signed: bool = False) -> str:
        return metrics.number(record.get(key), digits, signed)

    each = " ".join(f"{p}:{show(f'preference_group/{p}/reward', 2)}" for p in metrics.preference_groups(record))
    return [
        f"step {int(record['step'])}/{num_steps}",
        f"reward {show('reward', 3)}" + (f" ({each})" if each else ""),
        f"answered {show('answered', 2)}",
        f"scale {show('advantage_scale', 2)} bias {show('advantage_bias', 2, signed=True)}",
        f"kl {show('kl', 4)}",
        f"clip {show('clip_fraction', 2)}",
        f"entropy {show('entropy', 2)}",
        f"loss {show('loss', 4, signed=True)}",
        f"grad {show('grad_norm', 3)}",
        f"length {show('length', 1)}",
        f"truncated {show('truncated', 2)}",
        f"{show('tokens_per_sec', 0)} tok/s",
        f"generate {show('generation_secs', 1)}s update {show('update_secs', 1)}s",
    ]
