"""Floor 1: trains the tabular policy with the real estimators and the real objective, many seeds at once.

One step: P prompts of users drawn by share, G answers to each, rewards, `advantages.estimate` and `objective.policy_loss` as the learner
calls them (T = 1 token), one gradient step. Random numbers depend on the seed and the step alone, so that arms and regimes of equal
seed see the same prompts and the same draws, and differences between them can be taken seed by seed.

The gradient's norm is clipped at twice its running root mean square, and the step size divided by that (clipping, and Adam's second
moment, arXiv:1412.6980, with one number for all parameters). So an arm whose advantages are just larger than another's gains nothing by
it, and a rare preference group's small gradient stays small, as it does in the shared weights of a language model (Adam by
coordinate would blow it up in a table).
"""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp

from pgrpo_jax.algorithms import advantages, memory, objective, preference_weights, regularisers, reward_history
from pgrpo_jax.laboratory import environment
from pgrpo_jax.algorithms.advantages import AdvantageSettings
from pgrpo_jax.algorithms.preference_weights import PreferenceWeights
from pgrpo_jax.laboratory.environment import Policy, Regime
from pgrpo_jax.structs import RewardHistory

ROWS = ("preference", "pooled", "placebo")
_DECAY = 0.95  # of the running second moment of the gradient's norm, a step
_CLIP = 2.0  # largest norm of a gradient, in running root mean squares of it
_FIRST_KL_COEFFICIENT = 0.1
_OBJECTIVE = objective.Objective()  # GRPO's; with one token an answer all aggregations weigh alike


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much is trained.

    Attributes:
        num_steps: updates.
        early_step: the update after which "early" is measured.
        prompts_per_step: P.
        completions_per_prompt: G.
        num_contexts: X, prompts there are.
        num_actions: A, answers there are.
    """

    num_steps: int
    early_step: int
    prompts_per_step: int
    completions_per_prompt: int
    num_contexts: int
    num_actions: int


@dataclasses.dataclass(frozen=True)
class Arm:
    """One algorithm.

    Attributes:
        settings: of the advantages.
        weights: multipliers of the advantages by preference group.
        rows: one of `ROWS`, the row of the history that a prompt is compared with: its preference group's, one for all, or that of a
            preference group drawn anew for each prompt by the same shares.
        share_floor: least share of the prompts of each preference group (stratified sampling); 0 draws by the shares as they are.
        kl_target: nats that each preference group's policy may stay away from the first (uniform) one, held by a coefficient of its
            own (`regularisers.adapt`); 0 = no KL.
        learning_rate: length of a typical step in the space of logits.
    """

    settings: AdvantageSettings
    weights: PreferenceWeights = PreferenceWeights()
    rows: str = "preference"
    share_floor: float = 0.0
    kl_target: float = 0.0
    learning_rate: float = 1.0


@chex.dataclass(frozen=True, mappable_dataclass=False)
class _Numbers:
    """What of an arm does not need another compilation."""

    row: chex.Array  # place in ROWS
    share_floor: chex.Array
    kl_target: chex.Array
    learning_rate: chex.Array


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Outcome:
    """What one seed did.

    Attributes:
        curve: [S, K] float, normalised true reward of every preference group after each update.
        gradient_share: [K] float, share of the sum of the preference groups' gradient norms, mean over the updates.
        scale: [K] float, scale term of Corollary 3.1, mean over the updates in which it was defined; 0 where it never was.
        bias: [K] float, its bias term, likewise.
    """

    curve: chex.Array
    gradient_share: chex.Array
    scale: chex.Array
    bias: chex.Array


@chex.dataclass(frozen=True, mappable_dataclass=False)
class _State:
    policy: Policy
    history: RewardHistory
    kl_coefficients: chex.Array  # [K]
    square: chex.Array  # running second moment of the gradient's norm


@chex.dataclass(frozen=True, mappable_dataclass=False)
class _Batch:
    contexts: chex.Array  # [N]
    preference_ids: chex.Array  # [N]
    placebo_ids: chex.Array  # [N]
    prompt_index: chex.Array  # [N]
    actions: chex.Array  # [N]
    rewards: chex.Array  # [N]


def train(arm: Arm, regimes: Regime, seeds: chex.Array, budget: Budget) -> Outcome:
    """Trains one arm in every regime from every seed; arms with equal settings and weights share a compilation.

    Args:
        arm: the algorithm.
        regimes: `Regime` with a leading axis of E regimes.
        seeds: [M] int32.
        budget: how much is trained.

    Returns:
        `Outcome` with leading axes [E, M]; the same to the bit every time.

    Raises:
        ValueError: where the arm's rows are not among `ROWS`.
    """
    if arm.rows not in ROWS:
        raise ValueError(f"rows is {arm.rows!r}, must be one of {', '.join(ROWS)}: change the arm")
    numbers = _Numbers(
        row=jnp.int32(ROWS.index(arm.rows)), share_floor=jnp.float32(arm.share_floor), kl_target=jnp.float32(arm.kl_target),
        learning_rate=jnp.float32(arm.learning_rate),
    )
    return _train(arm.settings, arm.weights, budget, numbers, regimes, jnp.asarray(seeds, jnp.int32))


# Level 1 halves the compilation, which is half of the time of an arm, and runs as fast.
@functools.partial(jax.jit, static_argnames=("settings", "weights", "budget"), compiler_options={"xla_backend_optimization_level": 1})
def _train(
    settings: AdvantageSettings, weights: PreferenceWeights, budget: Budget, numbers: _Numbers, regimes: Regime, seeds: chex.Array
) -> Outcome:
    one = functools.partial(_train_one, settings, weights, budget, numbers)
    # One regime after the other: what 200 seeds hold at a time stays in the cache.
    return jax.lax.map(lambda regime: jax.vmap(one, in_axes=(None, 0))(regime, seeds), regimes)


def _train_one(
    settings: AdvantageSettings, weights: PreferenceWeights, budget: Budget, numbers: _Numbers, regime: Regime, seed: chex.Array
) -> Outcome:
    """`Outcome` of one seed in one regime."""
    sizes = {"num_contexts": budget.num_contexts, "num_actions": budget.num_actions}
    num_preference_groups = regime.shares.shape[0]
    world_key, steps_key = jax.random.split(jax.random.key(seed))
    utilities = environment.utilities(world_key, regime, **sizes)
    state = _State(
        policy=environment.initial_policy(num_preference_groups, **sizes),
        history=memory.init(settings.memory, num_preference_groups, jnp.float32),
        kl_coefficients=jnp.full(num_preference_groups, _FIRST_KL_COEFFICIENT),
        square=jnp.zeros(()),
    )

    def step(state: _State, number: chex.Array) -> tuple[_State, tuple[chex.Array, ...]]:
        batch = _draw(budget, numbers, regime, utilities, state.policy, jax.random.fold_in(steps_key, number))
        return _update(settings, weights, budget, numbers, regime, utilities, state, batch, number)

    _, (curve, share, scale, bias, defined) = jax.lax.scan(step, state, jnp.arange(budget.num_steps, dtype=jnp.int32))
    times = jnp.maximum(jnp.sum(defined, axis=0), 1).astype(scale.dtype)
    mean = [jnp.sum(jnp.where(defined, x, 0), axis=0) / times for x in (scale, bias)]
    return Outcome(curve=curve, gradient_share=jnp.mean(share, axis=0), scale=mean[0], bias=mean[1])


def _draw(
    budget: Budget, numbers: _Numbers, regime: Regime, utilities: chex.Array, policy: Policy, key: chex.PRNGKey
) -> _Batch:
    """Prompts, their answers and their rewards; G neighbouring rows answer the same prompt."""
    prompts, each = budget.prompts_per_step, budget.completions_per_prompt
    size = prompts * each
    uniform = jax.random.uniform(key, (3 * prompts + 3 * size,))
    ends = [prompts, 2 * prompts, 3 * prompts, 3 * prompts + size, 3 * prompts + 2 * size]
    who, placebo, what, act, succeed, noise = jnp.split(uniform, ends)
    spread = functools.partial(jnp.repeat, repeats=each, total_repeat_length=size)
    shares = environment.at_least(regime.shares, numbers.share_floor)
    preference_ids, placebo_ids = [
        spread(environment.draw_from(jnp.broadcast_to(shares, (prompts, *shares.shape)), number)) for number in (who, placebo)
    ]
    contexts = spread((what * budget.num_contexts).astype(jnp.int32))
    probabilities = jnp.exp(environment.log_probs(policy, regime.visibility))
    actions = environment.draw_from(probabilities[preference_ids, contexts], act)
    normal = jax.scipy.special.ndtri(jnp.clip(noise, 1e-7, 1 - 1e-7))
    rewards = environment.observed_rewards(regime, utilities[preference_ids, contexts, actions], preference_ids, succeed, normal)
    return _Batch(
        contexts=contexts, preference_ids=preference_ids, placebo_ids=placebo_ids,
        prompt_index=spread(jnp.arange(prompts, dtype=jnp.int32)), actions=actions, rewards=rewards,
    )


def _update(
    settings: AdvantageSettings, weights: PreferenceWeights, budget: Budget, numbers: _Numbers, regime: Regime, utilities: chex.Array,
    state: _State, batch: _Batch, number: chex.Array,
) -> tuple[_State, tuple[chex.Array, ...]]:
    """One update, and what is recorded of it."""
    mask = jnp.ones_like(batch.rewards, dtype=bool)
    rows = jnp.stack([batch.preference_ids, jnp.zeros_like(batch.preference_ids), batch.placebo_ids])[numbers.row]
    advantage, history, diagnostics = advantages.estimate(
        batch.rewards, batch.prompt_index, batch.preference_ids, rows, jnp.zeros_like(rows), mask, state.history,
        settings=settings, num_prompts=budget.prompts_per_step,
    )
    multipliers = preference_weights.weights(weights, diagnostics.history_mean, diagnostics.batch_count)
    advantage = advantage * multipliers[batch.preference_ids]
    coefficients = jnp.where(numbers.kl_target > 0, state.kl_coefficients, 0)
    table = environment.log_probs(state.policy, regime.visibility)
    by_preference, kl = jax.grad(_loss, has_aux=True)(table, batch, advantage, coefficients[batch.preference_ids], budget.prompts_per_step)
    gradient = environment.policy_gradient(by_preference, regime.visibility)
    policy, square = descend(state.policy, gradient, state.square, number, numbers.learning_rate)
    # Every parameter of the policy sees the gradient of the logits, the preference group's own ones v times it.
    norms = jnp.sqrt(jnp.sum(by_preference**2, axis=(1, 2)))
    state = _State(policy=policy, history=history, square=square, kl_coefficients=_adapt(state, batch, kl, diagnostics, numbers.kl_target))
    return state, (
        environment.normalised_rewards(environment.log_probs(policy, regime.visibility), utilities),
        norms / jnp.maximum(jnp.sum(norms), 1e-30), diagnostics.advantage_scale, diagnostics.bias, diagnostics.advantage_scale > 0,
    )


def _loss(
    logits: chex.Array, batch: _Batch, advantage: chex.Array, kl_coefficients: chex.Array, num_prompts: int
) -> tuple[chex.Array, chex.Array]:
    """−J of a step as a function of the logits of every preference group and context, [K, X, A]; and each completion's KL, [N]."""
    every = jax.nn.log_softmax(logits, axis=-1)[batch.preference_ids, batch.contexts]
    chosen = jnp.take_along_axis(every, batch.actions[:, None], axis=1)
    old = jax.lax.stop_gradient(chosen)
    reference = jnp.full_like(chosen, -math.log(logits.shape[-1]))
    entropies = -jnp.sum(jnp.exp(every) * every, axis=1, keepdims=True)
    mask = jnp.ones_like(chosen, dtype=bool)
    loss_sum, count, _ = objective.policy_loss(
        chosen, old, old, reference, entropies, advantage, kl_coefficients, mask, mask[:, 0], batch.prompt_index,
        objective=_OBJECTIVE, num_prompts=num_prompts,
    )
    return loss_sum / count, regularisers.k3(old, reference)[:, 0]


def _adapt(
    state: _State, batch: _Batch, kl: chex.Array, diagnostics: advantages.Diagnostics, target: chex.Array
) -> chex.Array:
    """The KL coefficients of all preference groups after an update; those without completions keep theirs."""
    present = diagnostics.batch_count > 0
    total = reward_history.segment_sum(kl, batch.preference_ids, jnp.ones_like(kl, dtype=bool), present.shape[0])
    mean = jnp.where(present, total / jnp.maximum(diagnostics.batch_count, 1).astype(kl.dtype), jnp.nan)
    return regularisers.adapt(state.kl_coefficients, mean, jnp.full_like(mean, 1) * jnp.where(target > 0, target, 1), 1.0)


def descend(
    params: chex.ArrayTree, gradient: chex.ArrayTree, square: chex.Array, number: chex.Array, learning_rate: chex.Array
) -> tuple[chex.ArrayTree, chex.Array]:
    """One step against the gradient: its norm clipped at twice the running root mean square, then divided by that.

    Args:
        params: pytree of float arrays.
        gradient: same shapes.
        square: scalar, running second moment of the gradient's norm, 0 before the first step.
        number: scalar int, steps done before this one.
        learning_rate: scalar, length of a typical step.

    Returns:
        The parameters after the step and the new second moment.
    """
    norm2 = sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient))
    before = square / (1 - _DECAY ** jnp.maximum(number, 1).astype(square.dtype))
    kept2 = jnp.where(before > 0, jnp.minimum(norm2, _CLIP**2 * before), norm2)
    square = _DECAY * square + (1 - _DECAY) * kept2
    root = jnp.sqrt(square / (1 - _DECAY ** (number.astype(square.dtype) + 1)))
    length = learning_rate * jnp.sqrt(kept2 / jnp.maximum(norm2, 1e-30)) / jnp.maximum(root, 1e-15)
    return jax.tree.map(lambda p, g: p - length * g, params, gradient), square
