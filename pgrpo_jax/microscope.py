"""Floor 5: the advantage microscope: recorded rollouts, seen by every scheme of advantages.

Recorded rewards are all that advantages are made of, so what GRPO, P-GRPO and their relatives would have made of the very same answers can be
recomputed after the fact, each scheme with a history replayed from the first recorded step. `microscope_measures.py` compares them.

What it can not show: the answers are those of one run's policy. Another scheme would have led the policy elsewhere.
"""

import dataclasses
import functools
import re
from typing import Any, Iterable, Mapping, NamedTuple, Sequence

import jax
import numpy as np
from etils import epath

from pgrpo_jax import batching, curation
from pgrpo_jax.algorithms import advantages, memory
from pgrpo_jax.algorithms.advantages import AdvantageSettings
from pgrpo_jax.algorithms.memory import Memory
from pgrpo_jax.curation import Curation
from pgrpo_jax.rollout_files import find_rollouts, load_rollouts
from pgrpo_jax.structs import Prompt, Rollouts
from pgrpo_jax.tasks.streams import named_stream

EMA_REWARDS, WINDOW_BATCHES, SHRINK_REWARDS = 128.0, 4, 32.0

# name -> (what differs from the P-GRPO of the run's configuration, whose history: "own", "pooled" or "placebo")
SCHEMES: dict[str, tuple[dict[str, Any], str]] = {
    "grpo": ({"baseline": "cohort", "scale": "cohort"}, "own"),
    "dr_grpo": ({"baseline": "cohort", "scale": "none"}, "own"),
    "rloo": ({"baseline": "leave_one_out", "scale": "none"}, "own"),
    "reinforce_pp": ({"baseline": "batch", "scale": "batch"}, "own"),
    "p_grpo": ({}, "own"),
    "after": ({"timing": "after"}, "own"),
    "ema": ({"memory": Memory("ema", EMA_REWARDS)}, "own"),
    "window": ({"memory": Memory("window", WINDOW_BATCHES)}, "own"),
    "blend": ({"blend": 0.5}, "own"),
    "scale_only": ({"baseline": "cohort"}, "own"),
    "shrinkage": ({"shrinkage": SHRINK_REWARDS}, "own"),
    "pooled": ({}, "pooled"),
    "placebo": ({}, "placebo"),
}
MEANINGS = {
    "grpo": "(R − μ_G) / σ_G, the completions of the prompt",
    "dr_grpo": "R − μ_G",
    "rloo": "R − mean of the prompt's other completions",
    "reinforce_pp": "(R − mean) / deviation of the batch",
    "p_grpo": "(R − μ_p) / σ_p, the history of the preference group before the batch",
    "after": "P-GRPO, the batch merged into the history first",
    "ema": f"P-GRPO, the history halves after {EMA_REWARDS:g} rewards",
    "window": f"P-GRPO, the last {WINDOW_BATCHES} batches of the preference group",
    "blend": "P-GRPO, baseline half μ_G and half μ_p",
    "scale_only": "(R − μ_G) / σ_p",
    "shrinkage": f"P-GRPO, {SHRINK_REWARDS:g} rewards' worth of the pooled history mixed in",
    "pooled": "control: one history for all",
    "placebo": "control: users permuted over the preference groups",
    "own": "the scheme of the run's configuration",
}


class Step(NamedTuple):
    """The rollouts that one update consumed: `number` (updates done after it) and units of work in canonical order."""

    number: int
    units: tuple[Rollouts, ...]


@dataclasses.dataclass(frozen=True)
class Own:
    """How the recorded run itself made its advantages.

    Attributes:
        settings: its estimator.
        curation: its shaping of rewards.
        components: names of reward components that it standardises apart.
    """

    settings: AdvantageSettings
    curation: Curation
    components: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Table:
    """All completions of all steps in canonical order. N completions, Q prompts (one for each time it was asked), S steps, K preference groups.

    Attributes:
        prompts: Q prompts.
        prompt: [N] int, place among the Q.
        step: [N] int, number of the step.
        preference: [N] int, preference group.
        reward: [N] float64, as the schemes see it (overlong penalties taken off).
        raw: [N] float64, as it was recorded.
        answers: N texts.
        advantages: scheme -> [N] float64.
        warm: [N] bool, P-GRPO's history had enough rewards: elsewhere P-GRPO gives GRPO's advantage.
        numbers: S step numbers.
        present: [S, K] int, completions.
        scale: [S, K] float64, scale term of Corollary 3.1, mean over completions; NaN where there are none, or the history is cold.
        bias: [S, K] float64, bias term, likewise.
    """

    prompts: tuple[Prompt, ...]
    prompt: np.ndarray
    step: np.ndarray
    preference: np.ndarray
    reward: np.ndarray
    raw: np.ndarray
    answers: tuple[str, ...]
    advantages: Mapping[str, np.ndarray]
    warm: np.ndarray
    numbers: tuple[int, ...]
    present: np.ndarray
    scale: np.ndarray
    bias: np.ndarray

    @property
    def num_preference_groups(self) -> int:
        """K."""
        return self.present.shape[1]


def read_steps(sources: Sequence[epath.PathLike]) -> tuple[Step, ...]:
    """Reads recorded rollouts in the order of their steps.

    Args:
        sources: run directories, or single rollout files; a file that is not named step_NNNNNN.npz belongs to the step after the largest
            `Work.step` in it.

    Raises:
        FileNotFoundError: a source, or the rollouts of a directory, are missing.
        ValueError: a file is damaged, or two are of one step.
    """
    steps: dict[int, tuple[epath.Path, tuple[Rollouts, ...]]] = {}
    for path in (file for source in sources for file in find_rollouts(source)):
        units = tuple(load_rollouts(path))
        named = re.fullmatch(r"step_(\d+)\.npz", path.name)
        if not named and not units:
            continue  # nothing was generated, and nothing says when
        number = int(named[1]) if named else 1 + max(unit.work.step for unit in units)
        if number in steps:
            raise ValueError(f"{path} and {steps[number][0]} are both of step {number}: give the rollouts of one run")
        steps[number] = path, units
    return tuple(Step(number, steps[number][1]) for number in sorted(steps))


def gaps(steps: Sequence[Step]) -> list[str]:
    """Returns what is missing between step 1 and the last one, for people: histories replayed without it are not those of the run."""
    numbers = [step.number for step in steps]
    missing = sorted(set(range(1, max(numbers, default=0) + 1)) - set(numbers))
    if not missing:
        return []
    runs = functools.reduce(lambda found, n: [*found[:-1], (found[-1][0], n)] if found and found[-1][1] == n - 1 else [*found, (n, n)], missing, [])
    listed = ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in runs)
    return [f"steps {listed} are not recorded: the histories are replayed without them, so advantages against a history differ from the run's"]


def look(steps: Sequence[Step], base: AdvantageSettings, *, own: Own | None = None, num_preference_groups: int = 1, seed: int = 0) -> Table:
    """Recomputes the advantages of every recorded completion under every scheme.

    Args:
        steps: of `read_steps`, at least one completion.
        base: what all schemes have in common: cold start, floor, epsilon, and so on; P-GRPO is this with the history as baseline and scale.
        own: how the run itself made its advantages, which are then recomputed as the scheme "own"; None = not known.
        num_preference_groups: K; more where the prompts name more.
        seed: of the placebo.

    Raises:
        ValueError: there is no completion, or a reward component is missing.
    """
    prompts = tuple(prompt for step in steps for unit in step.units for prompt in unit.prompt_records)
    if not sum(len(unit.rewards) for step in steps for unit in step.units):
        raise ValueError("0 completions are recorded, at least 1 is needed: give the rollouts of a run that has trained a step")
    size = max(num_preference_groups, 1 + max(max(p.preference_id, p.history_row) for p in prompts))
    per_prompt = max(int(np.bincount(unit.prompt_index).max(initial=0)) for step in steps for unit in step.units)
    base = dataclasses.replace(base, baseline="history", scale="history", component_weights=())
    schemes = {name: dataclasses.replace(base, **changes) for name, (changes, _) in SCHEMES.items()}
    whose = {name: rows for name, (_, rows) in SCHEMES.items()}
    if own is not None:
        schemes["own"], whose["own"] = own.settings, "own"
    components = {"own": len(own.components)} if own is not None and own.components else {}
    histories = {name: memory.init(s.memory, size, num_components=components.get(name)) for name, s in schemes.items()}
    permuted = placebo_rows(prompts, seed)
    parts = []
    for step in steps:
        inputs, rows = _inputs(step, own, per_prompt, permuted)
        found, histories = _estimate_all(
            inputs, histories, schemes=tuple(schemes.items()), whose=tuple(whose.items()), num_prompts=sum(len(u.prompts) for u in step.units)
        )
        parts.append(_rows_of(step, inputs, rows, jax.device_get(found), max(base.min_count, 1)))
    firsts = np.cumsum([0] + [sum(len(unit.prompt_records) for unit in step.units) for step in steps])
    joined = {name: np.concatenate([part[name] for part in parts]) for name in ("step", "preference", "reward", "raw", "warm")}
    return Table(
        prompts=prompts,
        prompt=np.concatenate([first + part["prompt"] for first, part in zip(firsts, parts)]),
        answers=tuple(text for step in steps for unit in step.units for text in unit.texts),
        advantages={name: np.concatenate([part["advantages"][name] for part in parts]) for name in schemes},
        numbers=tuple(step.number for step in steps),
        **{name: np.stack([part[name] for part in parts]) for name in ("present", "scale", "bias")},
        **joined,
    )


def placebo_rows(prompts: Iterable[Prompt], seed: int) -> dict[str, int]:
    """Returns user -> row of the placebo: the users' own rows, permuted. Where a task knows no users every prompt is one.

    Args:
        prompts: as recorded.
        seed: of the permutation.
    """
    own = {user_of(prompt): prompt.history_row for prompt in prompts}
    users = sorted(own)
    return dict(zip(users, named_stream(seed, "placebo of the microscope").permutation([own[user] for user in users]).tolist()))


def user_of(prompt: Prompt) -> str:
    """Returns what tells a prompt's user from others: his pseudonym; in older records what the facts name; without users the prompt's id."""
    return prompt.user_id or str(prompt.facts.get("user", prompt.prompt_id))


def _inputs(step: Step, own: Own | None, per_prompt: int, permuted: Mapping[str, int]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What the estimators are given of a step, padded, and the row of each completion in it."""
    flat = batching.to_train_batch(step.units, completions_per_prompt=per_prompt, pad_id=0)
    shaping = Curation(prompts_per_step=len(flat.prompts)) if own is None else own.curation
    signal = curation.signals(step.units, flat, shaping, step=step.number - 1)
    apart = () if own is None else own.components
    mine = curation.signals(step.units, flat, shaping, step=step.number - 1, components=apart) if apart else signal
    placebo = np.array([permuted[user_of(p)] for unit in step.units for p in unit.prompt_records], np.int32)
    inputs = {
        "rewards": signal.rewards, "own_rewards": mine.rewards, "raw": flat.rewards, "prompt_index": flat.prompt_index,
        "preference": flat.preference_ids[flat.prompt_index], "own": signal.history_ids, "pooled": np.zeros_like(signal.history_ids),
        "placebo": placebo[flat.prompt_index], "staleness": signal.staleness, "valid": flat.valid,
    }  # fmt: skip
    return inputs, batching.completion_rows(step.units, completions_per_prompt=per_prompt)


@functools.partial(jax.jit, static_argnames=("schemes", "whose", "num_prompts"))
def _estimate_all(
    inputs: Mapping[str, Any], histories: Mapping[str, Any], *, schemes: tuple, whose: tuple, num_prompts: int
) -> tuple[dict, dict]:
    """All schemes in one program, in which what they share is computed once: ({name: (advantages, diagnostics)}, histories after)."""
    rows, found, after = dict(whose), {}, {}
    for name, settings in schemes:
        values, after[name], diagnostics = advantages.estimate(
            inputs["own_rewards" if name == "own" else "rewards"], inputs["prompt_index"], inputs["preference"], inputs[rows[name]],
            inputs["staleness"], inputs["valid"], histories[name], settings=settings, num_prompts=num_prompts,
        )  # fmt: skip
        found[name] = values, diagnostics
    return found, after


def _rows_of(step: Step, inputs: Mapping[str, np.ndarray], rows: np.ndarray, found: Mapping[str, Any], least: float) -> dict[str, Any]:
    """A step's part of the table."""
    seen = found["p_grpo"][1]
    warm = np.asarray(seen.effective_count) >= least
    warm_rows = warm[inputs["own"]]
    preference, count = inputs["preference"], np.asarray(seen.batch_count)
    # The estimators' mean counts cold completions as 0: a preference group whose histories are all cold has no terms.
    known = np.array([(warm_rows & inputs["valid"] & (preference == k)).any() for k in range(len(count))])
    return {
        "step": np.full(len(rows), step.number), "prompt": inputs["prompt_index"][rows].astype(np.int64), "preference": preference[rows],
        "reward": inputs["rewards"][rows].astype(np.float64), "raw": inputs["raw"][rows].astype(np.float64), "warm": warm_rows[rows],
        "advantages": {name: np.asarray(values, np.float64)[rows] for name, (values, _) in found.items()},
        "present": count, "scale": np.where(known, seen.advantage_scale, np.nan), "bias": np.where(known, seen.bias, np.nan),
    }  # fmt: skip
