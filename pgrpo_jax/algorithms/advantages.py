"""Floor 0: advantages of completions from their rewards: GRPO (arXiv:2402.03300), P-GRPO (arXiv:2603.10009), and their relatives.

    A_i = (R_i − baseline) / scale          baseline and scale are chosen apart (`AdvantageSettings`)

    GRPO          A_i = (R_i − μ_G) / (σ_G + ε)              μ_G, σ_G: the completions of the same prompt
    P-GRPO        Ã_i = (R_i − μ_p) / (max(σ_p, floor) + ε)   μ_p, σ_p: all past rewards of the user's preference group p
    Corollary 3.1 Ã_i = scale_i·A_i + bias_i

One advantage a completion; the objective copies it to the completion's tokens. Deviations are population deviations unless asked for.

Letters: B completions on this device, P prompts, K preference groups, C reward components. `axis_name` names a mapped axis (pmap,
shard_map) over which the completions are spread, those of one prompt on any devices; `prompt_index` counts prompts over all of them.
Every function runs the same eagerly, under jit (also on sharded inputs), shard_map and pmap, in the dtype of the rewards. Masked
rows may hold anything and get advantage 0; a kept row with an id out of range counts in no statistics and gets NaN from them.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from pgrpo_jax.algorithms import formulas, memory, reward_history
from pgrpo_jax.algorithms.memory import Memory
from pgrpo_jax.structs import RewardHistory

BASELINES = ("none", "cohort", "leave_one_out", "batch", "history")
SCALES = ("none", "cohort", "batch", "history")
TIMINGS = ("before", "after")
COLD_STARTS = ("cohort", "zero", "pooled")
DEVIATIONS = ("population", "sample")


@dataclasses.dataclass(frozen=True)
class AdvantageSettings:
    """An estimator, as data. GRPO is cohort/cohort, P-GRPO history/history, Dr. GRPO cohort/none, scale-only cohort/history.

    Attributes:
        baseline: what is subtracted: "none", the mean of the prompt's completions ("cohort"), of its other completions ("leave_one_out",
            RLOO, arXiv:2402.14740), of the batch, or of the history.
        scale: what it is divided by: 1, or a deviation of the prompt's completions, of the batch, or of the history.
        blend: λ in [0, 1]: the history baseline is λ·μ_G + (1−λ)·μ_p.
        timing: is this batch compared with the history "before" it is merged (the baseline is independent of the reward) or "after".
        cold_start: advantage while a history is cold: "cohort", GRPO's; "zero"; "pooled", against all histories together, GRPO's while
            these are cold too.
        min_count: effective rewards that a history needs; at least one, whatever the value.
        epsilon: added to every deviation, reward units. At 0, equal rewards still give 0.
        std_floor: smallest deviation of a history, reward units. Where it, epsilon and the deviation are all 0 the advantage is 0.
        deviation: "population" or "sample" (n − 1).
        shrinkage: rewards' worth of all histories together that each history is mixed with before it is used.
        memory: how long the histories remember.
        component_weights: weights of reward components that are standardised apart; () = one total.
        staleness_half_life: updates of staleness that halve a reward's weight in the history; 0 = off.
        staleness_limit: rewards of this staleness or more do not enter the history; 0 = off.
    """

    baseline: str = "history"
    scale: str = "history"
    blend: float = 0.0
    timing: str = "before"
    cold_start: str = "cohort"
    min_count: float = 32.0
    epsilon: float = 1e-6
    std_floor: float = 1e-3
    deviation: str = "population"
    shrinkage: float = 0.0
    memory: Memory = Memory()
    component_weights: tuple[float, ...] = ()
    staleness_half_life: float = 0.0
    staleness_limit: int = 0

    def __post_init__(self):
        parts = {"baseline": BASELINES, "scale": SCALES, "timing": TIMINGS, "cold_start": COLD_STARTS, "deviation": DEVIATIONS}
        for name, known in parts.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be one of {', '.join(known)}: set algorithm.{name}")

    @property
    def sample(self) -> bool:
        """Whether deviations are sample deviations."""
        return self.deviation == "sample"


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Diagnostics:
    """What the estimators report, one row for each preference group; the same on every device.

    `history_…` and `effective_count` are rows of the history: under the arms "pooled" and "placebo" those of other people. With several
    reward components counts are those of one, and the rest are sums over components, each times its weight.

    Attributes:
        batch_count: [K] int32, completions of the batch.
        batch_mean: [K] float, their mean reward; 0 without completions.
        batch_std: [K] float, population deviation of their rewards; 0 without completions.
        advantage_scale: [K] float, mean over these completions of the scale of Corollary 3.1, about σ_G/σ_p. It and the next
            say what P-GRPO does, or would do, to GRPO's advantages; both are 0 without completions and while the history is
            cold (then GRPO's advantage is used as it is).
        bias: [K] float, mean over these completions of the bias term of Corollary 3.1, (μ_G − μ_p)/σ_p.
        history_count: [K] int32, past rewards, this batch not included.
        history_mean: [K] float, their mean μ_p; 0 without rewards.
        history_std: [K] float, their population deviation σ_p, before the floor; 0 without rewards.
        effective_count: [K] float, rewards that the history counts for as it is used, shrinkage included.
    """

    batch_count: chex.Array
    batch_mean: chex.Array
    batch_std: chex.Array
    advantage_scale: chex.Array
    bias: chex.Array
    history_count: chex.Array
    history_mean: chex.Array
    history_std: chex.Array
    effective_count: chex.Array


def estimate(
    rewards: chex.Array, prompt_index: chex.Array, preference_ids: chex.Array, history_ids: chex.Array, staleness: chex.Array,
    mask: chex.Array, history: RewardHistory,
    *, settings: AdvantageSettings, num_prompts: int, axis_name: str | None = None,
) -> tuple[chex.Array, RewardHistory, Diagnostics]:
    """Advantages, and the history with this batch in it, once.

    The history is kept whatever the estimator; where baseline and scale do not use it, it is an instrument.

    Args:
        rewards: [B] float, or [B, C] components, each standardised against its own moments and histories, then weighted and added up.
        prompt_index: [B] int, in [0, P).
        preference_ids: [B] int, the preference group of each completion's user, in [0, K); only the diagnostics are by it.
        history_ids: [B] int, the row of the history that each completion is compared with and goes to; P-GRPO's are the preference ids.
        staleness: [B] int, updates since the weights that generated the completion.
        mask: [B] bool, False on rows that only pad.
        history: of `memory.init`, same dtype as the rewards; the same on every device.
        settings: the estimator.
        num_prompts: P, over all devices.
        axis_name: mapped axis the completions are spread over, or None.

    Returns:
        ([B] advantages, 0 on masked rows; the history after the batch; `Diagnostics`), the last two the same on every device.
    """
    chex.assert_equal_shape([prompt_index, preference_ids, history_ids, staleness, mask])
    chex.assert_trees_all_equal_dtypes(rewards, history.weight, history.mean, history.m2)

    def of_component(values: chex.Array, past: RewardHistory) -> tuple[chex.Array, RewardHistory, Diagnostics]:
        rows = _Rows(prompt_index, preference_ids, history_ids, staleness, mask, num_prompts, axis_name)
        return _estimate(values, past, rows, settings)

    if rewards.ndim == 1:
        return of_component(rewards, history)
    chex.assert_shape(rewards, (None, len(settings.component_weights)))
    advantages, merged, diagnostics = jax.vmap(of_component, in_axes=(1, 0))(rewards, history)
    weights = jnp.asarray(settings.component_weights, rewards.dtype)

    def joined(values: chex.Array) -> chex.Array:
        return values[0] if jnp.issubdtype(values.dtype, jnp.integer) else jnp.tensordot(weights, values, axes=1)

    return joined(advantages), merged, jax.tree.map(joined, diagnostics).replace(effective_count=diagnostics.effective_count[0])


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What is known of each completion beside its reward, and the axis it is spread over."""

    prompt_index: chex.Array
    preference_ids: chex.Array
    history_ids: chex.Array
    staleness: chex.Array
    mask: chex.Array
    num_prompts: int
    axis_name: str | None

    def moments(self, rewards: chex.Array, ids: chex.Array, size: int, weights: chex.Array | None = None) -> RewardHistory:
        return reward_history.batch_moments(rewards, ids, self.mask, size, weights=weights, axis_name=self.axis_name)

    def spread(self, values: chex.Array, ids: chex.Array) -> chex.Array:
        return reward_history.rows(values, ids, self.mask)


def _estimate(
    rewards: chex.Array, history: RewardHistory, rows: _Rows, settings: AdvantageSettings
) -> tuple[chex.Array, RewardHistory, Diagnostics]:
    """`estimate` for one component."""
    past = memory.read(settings.memory, history)
    num_rows = past.count.shape[0]
    prompts = rows.moments(rewards, rows.prompt_index, rows.num_prompts)
    arrived = rows.moments(rewards, rows.history_ids, num_rows, _history_weights(rows.staleness, rewards.dtype, settings))
    merged = memory.absorb(settings.memory, history, arrived)
    used = past if settings.timing == "before" else memory.read(settings.memory, merged)
    everyone = reward_history.pooled(used)
    if settings.shrinkage:
        used = _shrunk(used, everyone, settings.shrinkage)
    advantages = _advantages(rewards, prompts, used, everyone, rows, settings)
    return advantages, merged, _diagnose(rewards, prompts, past, used, rows, settings)


def _history_weights(staleness: chex.Array, dtype: jnp.dtype, settings: AdvantageSettings) -> chex.Array | None:
    """[B]: what each reward counts for in the history; None where all count alike."""
    if not settings.staleness_half_life and not settings.staleness_limit:
        return None
    age = staleness.astype(dtype)
    weights = jnp.exp2(-age / settings.staleness_half_life) if settings.staleness_half_life else jnp.ones_like(age)
    return jnp.where(staleness >= settings.staleness_limit, 0, weights) if settings.staleness_limit else weights


def _shrunk(used: RewardHistory, everyone: RewardHistory, pseudo_rewards: float) -> RewardHistory:
    """Each history with `pseudo_rewards` rewards distributed like all histories together; as they are where there is none at all."""
    known = reward_history.effective_count(everyone)
    share = jnp.where(known > 0, pseudo_rewards / jnp.where(known > 0, known, 1), 0)
    prior = everyone.replace(weight=everyone.weight * share, m2=everyone.m2 * share)
    spread = jax.tree.map(lambda x: jnp.broadcast_to(x, used.mean.shape), prior)
    mixed = reward_history.merge(used, spread)
    return jax.tree.map(lambda new, old: jnp.where(known > 0, new, old), mixed, used)


def _warm(history: RewardHistory, settings: AdvantageSettings) -> chex.Array:
    """[S] bool: enough past rewards to stand on; never without any."""
    return reward_history.effective_count(history) >= max(settings.min_count, 1)


def _advantages(
    rewards: chex.Array, prompts: RewardHistory, used: RewardHistory, everyone: RewardHistory, rows: _Rows, settings: AdvantageSettings
) -> chex.Array:
    """[B]: the estimator, and what stands for it where a history is cold."""
    advantages = _compare(rewards, prompts, used, rows.history_ids, rows, settings)
    if "history" not in (settings.baseline, settings.scale):
        return advantages
    if settings.cold_start == "zero":
        instead = jnp.zeros_like(rewards)
    else:
        instead = formulas.standardise(rewards, rows.prompt_index, rows.mask, prompts, epsilon=settings.epsilon, std_floor=0.0, sample=settings.sample)
    if settings.cold_start == "pooled":
        first = jnp.zeros_like(rows.history_ids)
        instead = jnp.where(_warm(everyone, settings), _compare(rewards, prompts, everyone, first, rows, settings), instead)
    return jnp.where(rows.spread(_warm(used, settings), rows.history_ids), advantages, instead)


def _compare(
    rewards: chex.Array, prompts: RewardHistory, past: RewardHistory, ids: chex.Array, rows: _Rows, settings: AdvantageSettings
) -> chex.Array:
    """(R − baseline) / scale, [B], the history in use being row `ids` of `past`; 0 where the divisor is 0 and on masked rows."""
    everything = jnp.zeros_like(rows.prompt_index)
    batch = rows.moments(rewards, everything, 1) if "batch" in (settings.baseline, settings.scale) else prompts
    own = rows.spread(prompts.mean, rows.prompt_index)
    if settings.baseline == "history":
        baseline = rows.spread(past.mean, ids)
        if settings.blend:
            baseline = settings.blend * own + (1 - settings.blend) * baseline
    else:
        baseline = {"none": jnp.zeros_like(own), "batch": rows.spread(batch.mean, everything)}.get(settings.baseline, own)
    difference = rewards - baseline
    if settings.baseline == "leave_one_out":  # R − (Σ − R)/(n − 1) = (R − mean)·n/(n − 1); a single completion has nothing beside it
        count = rows.spread(prompts.count.astype(rewards.dtype), rows.prompt_index)
        difference = difference * jnp.where(count > 1, count / jnp.where(count > 1, count - 1, 1), 0)
    floors = {"cohort": (prompts, 0.0, rows.prompt_index), "batch": (batch, 0.0, everything), "history": (past, settings.std_floor, ids)}
    if settings.scale == "none":
        return jnp.where(rows.mask, difference, 0)
    moments, floor, where = floors[settings.scale]
    divisor = rows.spread(reward_history.std(moments, floor=floor, sample=settings.sample) + settings.epsilon, where)
    degenerate = (divisor == 0) | ~rows.mask
    return jnp.where(degenerate, 0, difference / jnp.where(degenerate, 1, divisor))


def _diagnose(
    rewards: chex.Array, prompts: RewardHistory, past: RewardHistory, used: RewardHistory, rows: _Rows, settings: AdvantageSettings
) -> Diagnostics:
    num_preference_groups = past.count.shape[0]
    batch = rows.moments(rewards, rows.preference_ids, num_preference_groups)
    options = {"epsilon": settings.epsilon, "std_floor": settings.std_floor, "sample": settings.sample}
    terms = formulas.corollary(rows.prompt_index, rows.history_ids, rows.mask, prompts, used, **options)
    warm = rows.spread(_warm(used, settings), rows.history_ids)
    # Sums first, division after: the completions of a preference group lie on several devices.
    sums = [
        reward_history.segment_sum(jnp.where(warm, t, 0), rows.preference_ids, rows.mask, num_preference_groups, axis_name=rows.axis_name)
        for t in terms
    ]
    divisor = jnp.maximum(batch.count, 1).astype(rewards.dtype)
    return Diagnostics(
        batch_count=batch.count, batch_mean=batch.mean, batch_std=reward_history.std(batch),
        advantage_scale=sums[0] / divisor, bias=sums[1] / divisor,
        history_count=past.count, history_mean=past.mean, history_std=reward_history.std(past),
        effective_count=reward_history.effective_count(used),
    )
