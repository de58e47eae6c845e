"""Floor 5: what goes wrong slowly, from the records of the steps: falling rewards, collapsing entropy, drifting lengths, repeats.

Alarms are a pure function of the records, so that a resumed run raises the same ones. A mean over the last `window` recorded values is
compared with an earlier one, and the change must be larger than chance *and* large enough to matter:

    change > noise · s · √(2 / window),   s² = mean of (x_t − x_{t−1})² / 2 over all steps so far

s is the deviation of a single value: successive differences do not see a slow drift. An alarm is raised once and stays until the value has
gone back by a margin (`release`), so that it does not come and go with every step.
"""

import collections
import dataclasses
import math
from typing import Any, Mapping, NamedTuple, Sequence

from pgrpo_jax import metrics

_SHORTEST = 0.5  # tokens; a mean length of 0, where all completions are empty, counts as this


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """When an alarm is raised. The defaults raise none in 99 of 100 runs of 200 steps of stationary noise.

    Attributes:
        window: recorded values a mean is taken over; nothing is said before twice as many.
        noise: standard errors of a difference of two such means that a change must exceed.
        reward_fall: fall of a mean reward below the best earlier one, in deviations of the rewards of a step (`reward_std`).
        entropy_share: of its first mean, below which the entropy has collapsed, if it is also below
        entropy_floor: nats/token.
        length_ratio: to its first (geometric) mean, or its inverse, from which on a length has drifted; above 1.
        duplicates_rise: of the share of repeated completions over its first mean.
        truncated_rise: of the share of truncated completions over its first mean.
        left_behind: standard errors that a preference group's reward fell by, and the others' rose by meanwhile.
        patience: steps in a row that the following must hold for.
        mismatch_p95: nats/token, of |log-prob of sampler − log-prob of learner|.
        effective_sample_size: share of the tokens that the importance weights leave.
        release: share of a bound that a value must go back below (above, where low is bad) for its alarm to end.
    """

    window: int = 10
    noise: float = 6.0
    reward_fall: float = 0.1
    entropy_share: float = 0.2
    entropy_floor: float = 0.1
    length_ratio: float = 2.0
    duplicates_rise: float = 0.3
    truncated_rise: float = 0.3
    left_behind: float = 4.0
    patience: int = 3
    mismatch_p95: float = 0.1
    effective_sample_size: float = 0.5
    release: float = 0.7


class Alarm(NamedTuple):
    """Something that has gone wrong and still is; a step's record holds it as `_asdict()`, in the list `alarms`.

    Attributes:
        key: what, for example "entropy_collapse", or "preference_group/2/entropy_collapse" for one preference group.
        since: the step it was raised at.
        value: as it is now.
        bound: what the value went beyond.
        remedy: what happened and what to do, one line.
    """

    key: str
    since: int
    value: float
    bound: float
    remedy: str


REMEDIES = {
    "reward_falling": "reward fell below its best mean: lower optimiser.learning_rate or raise the KL coefficient; go back to an "
                      "earlier checkpoint",
    "entropy_collapse": "answers have become the same: raise the entropy or the KL coefficient, or lower optimiser.learning_rate",
    "length_drift": "completions became far longer or shorter: read samples.jsonl; see whether the reward pays for length",
    "truncated_rising": "more completions run out of tokens: raise generation.max_new_tokens or shape the reward of overlong answers",
    "duplicates_rising": "completions of a prompt repeat each other and carry no signal: raise generation.temperature or the entropy "
                         "coefficient",
    "left_behind": "this preference group falls while the others rise: try preset=p_grpo, preference weights, or a floor for its share of "
                   "the batch",
    "zero_gradients": "the gradient is 0, nothing is learned: read the note beside the step's loss; give easier prompts or preset=p_grpo",
    "mismatch": "the sampler's log-probs are not the learner's: compare their dtype and temperature; switch on the importance correction",
    "effective_sample_size": "a few tokens outweigh the rest: lower the staleness, or bound the importance weights more tightly",
}  # fmt: skip
"""What each alarm says."""


class Episode(NamedTuple):
    """An alarm from its beginning to its end: as it was last recorded, and the first step without it, None where it still holds."""

    alarm: Mapping[str, Any]
    until: int | None


def check(records: Sequence[Mapping[str, Any]], thresholds: Thresholds = Thresholds()) -> tuple[Alarm, ...]:
    """Returns the alarms that hold after the last of a run's records, in the order of their keys; see `Watch` for a run that goes on.

    Args:
        records: of steps (docs/metrics.md), all from the first on. What is missing or null is passed over.
        thresholds: when an alarm is raised.
    """
    watch, alarms = Watch(thresholds), ()
    for record in records:
        alarms = watch.step(record)
    return alarms


def episodes(records: Sequence[Mapping[str, Any]]) -> list[Episode]:
    """Returns the alarms that were recorded in a run, in the order they were raised.

    Args:
        records: of steps; their `alarms`, where they have any, are read.
    """
    found: dict[tuple[str, int], Episode] = {}
    for record in records:
        now = {(alarm["key"], alarm["since"]): alarm for alarm in record.get("alarms") or ()}
        for name, (alarm, until) in found.items():
            if name not in now and until is None:
                found[name] = Episode(alarm, int(record["step"]))
        found |= {name: Episode(alarm, None) for name, alarm in now.items()}
    return sorted(found.values(), key=lambda episode: (episode.alarm["since"], episode.alarm["key"]))


def sentence(alarm: Mapping[str, Any]) -> str:
    """Returns a recorded alarm as one line for a person."""
    value, bound = metrics.number(alarm.get("value")), metrics.number(alarm.get("bound"))
    return f"{alarm['key']} since step {alarm['since']}: {value} (bound {bound}): {alarm['remedy']}"


class Watch:
    """`check`, one record after the other: its state is a fold over the records, of constant size.

    Args:
        thresholds: when an alarm is raised.
    """

    def __init__(self, thresholds: Thresholds = Thresholds()):
        self._t = thresholds
        self._series: dict[str, _Series] = collections.defaultdict(lambda: _Series(thresholds.window))
        self._streaks: dict[str, collections.deque[float]] = collections.defaultdict(lambda: collections.deque(maxlen=thresholds.patience))
        self._others: dict[str, dict[str, float]] = {}  # rewards of the others, when a preference group's was at its best
        self._spread = 0.0  # deviation of the rewards of a step
        self._since: dict[str, int] = {}
        self._findings: dict[str, _Finding] = {}

    def step(self, record: Mapping[str, Any]) -> tuple[Alarm, ...]:
        """Takes the next record and returns the alarms that hold after it, in the order of their keys.

        Args:
            record: of a step; their steps rise.
        """
        scopes = [f"preference_group/{p}/" for p in metrics.preference_groups(record)]
        self._spread = _or(record.get("reward_std"), self._spread)
        findings = self._at_once(record)  # of what the record measures; what it does not measure stands as it stood
        for scope in ("", *scopes):
            findings |= self._drifts(record, scope)
        for scope in scopes:
            findings |= self._left_behind(scope, [other for other in scopes if other != scope])
        for key, found in findings.items():
            if found.severity >= 1.0:
                self._since.setdefault(key, int(record["step"]))
            elif found.severity < self._t.release:
                self._since.pop(key, None)
        self._findings |= findings
        held = [(key, since, self._findings[key]) for key, since in sorted(self._since.items())]
        return tuple(Alarm(key, since, found.value, found.bound, REMEDIES[key.rsplit("/", 1)[-1]]) for key, since, found in held)

    def _drifts(self, record: Mapping[str, Any], scope: str) -> dict[str, "_Finding"]:
        """Findings on the series of one scope, "" or "preference_group/{p}/", that have enough values."""
        found = {}
        for name, (alarm, rule) in _RULES.items():
            series, value = self._series[scope + name], metrics.finite(record.get(scope + name))
            series.at_best = False
            if value is not None:
                series.add(math.log(max(value, _SHORTEST)) if name == "length" else value)
            if series.ready:
                found[scope + alarm] = rule(series, self._t, self._spread)
        return found

    def _left_behind(self, scope: str, others: Sequence[str]) -> dict[str, "_Finding"]:
        """A preference group fell since its best time, while the others, taken together, rose."""
        own, rest = self._series[scope + "reward"], [key for other in others if self._series[key := other + "reward"].ready]
        if not own.ready:
            return {}
        if own.at_best:
            self._others[scope] = {key: self._series[key].earlier for key in rest}
        risen = [self._series[key].rise(start) for key, start in self._others.get(scope, {}).items()]
        together = sum(risen) / math.sqrt(len(risen)) if risen else 0.0  # each of deviation 1: Stouffer's sum
        severity = min(-own.rise(own.best), together) / self._t.left_behind
        return {scope + "left_behind": _Finding(severity, own.recent, own.best)}

    def _at_once(self, record: Mapping[str, Any]) -> dict[str, "_Finding"]:
        """Findings that need no history, only `patience` steps in a row."""
        t, found = self._t, {}
        for key, alarm, severity, bound in (
            ("grad_norm", "zero_gradients", lambda x: float(x == 0.0), 0.0),
            ("mismatch/p95", "mismatch", lambda x: x / t.mismatch_p95, t.mismatch_p95),
            ("effective_sample_size", "effective_sample_size", lambda x: _over(t.effective_sample_size, x), t.effective_sample_size),
        ):
            value, streak = metrics.finite(record.get(key)), self._streaks[alarm]
            stale = alarm == "mismatch" and (metrics.finite(record.get("staleness")) or 0.0) > 0  # then the weights differ, not the arithmetic
            if value is not None and not stale:
                streak.append(severity(value))
                if len(streak) == t.patience:  # it takes as many steps to end as to begin
                    found[alarm] = _Finding(max(streak) if alarm in self._since else min(streak), value, bound)
        return found


class _Finding(NamedTuple):
    """From severity 1 on an alarm is raised; `value` and `bound` are what it says."""

    severity: float
    value: float
    bound: float


class _Series:
    """The running numbers of one key: means over the last window and the one before it, the first, the best and the noise."""

    def __init__(self, window: int):
        self._values: collections.deque[float] = collections.deque(maxlen=2 * window)
        self._window, self._squares, self._differences = window, 0.0, 0
        self.ready = self.at_best = False
        self.recent = self.earlier = self.first = 0.0
        self.best = -math.inf

    def add(self, value: float) -> None:
        if self._values:
            self._squares += (value - self._values[-1]) ** 2
            self._differences += 1
        self._values.append(value)
        if len(self._values) < 2 * self._window:
            return
        values = list(self._values)
        self.earlier, self.recent = (sum(part) / self._window for part in (values[:self._window], values[self._window:]))
        if not self.ready:
            self.first = self.earlier
        self.at_best = self.earlier >= self.best
        self.best, self.ready = max(self.best, self.earlier), True

    @property
    def error(self) -> float:
        """Standard error of the difference of two means over a window."""
        return math.sqrt(self._squares / (2 * self._differences) * 2 / self._window)

    def rise(self, start: float) -> float:
        """How far the recent mean lies above an earlier one, in standard errors."""
        return _over(self.recent - start, self.error)


def _over(a: float, b: float) -> float:
    """a / b; where b is 0 it is infinite, or 0 where both are."""
    if b != 0.0:
        return a / b
    return math.copysign(math.inf, a) if a != 0.0 else 0.0


def _or(value: Any, default: float) -> float:
    known = metrics.finite(value)
    return default if known is None else known


def _reward(series: _Series, t: Thresholds, spread: float) -> _Finding:
    allowed = max(t.noise * series.error, t.reward_fall * spread)
    return _Finding(_over(series.best - series.recent, allowed), series.recent, series.best - allowed)


def _entropy(series: _Series, t: Thresholds, _: float) -> _Finding:
    bound = min(t.entropy_share * series.first, t.entropy_floor)
    severity = min(-series.rise(series.first) / t.noise, _over(bound, max(series.recent, 0.0)))
    return _Finding(severity, series.recent, bound)


def _length(series: _Series, t: Thresholds, _: float) -> _Finding:
    """On logarithms: lengths have long tails, and it is their ratio that counts."""
    drift, allowed = series.recent - series.first, math.log(t.length_ratio)
    severity = min(abs(series.rise(series.first)) / t.noise, abs(drift) / allowed)
    return _Finding(severity, math.exp(series.recent), math.exp(series.first + math.copysign(allowed, drift)))


def _share(series: _Series, t: Thresholds, allowed: float) -> _Finding:
    severity = min(series.rise(series.first) / t.noise, (series.recent - series.first) / allowed)
    return _Finding(severity, series.recent, series.first + allowed)


_RULES = {
    "reward": ("reward_falling", _reward),
    "entropy": ("entropy_collapse", _entropy),
    "length": ("length_drift", _length),
    "truncated": ("truncated_rising", lambda series, t, _: _share(series, t, t.truncated_rise)),
    "duplicates": ("duplicates_rising", lambda series, t, _: _share(series, t, t.duplicates_rise)),
}
"""Metric -> (alarm, rule of (series, thresholds, deviation of a step's rewards))."""
