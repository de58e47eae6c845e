"""Floor 1: trains the tabular policy with the real estimators and the real objective, many seeds at once.

One step: P prompts of users drawn by share, G answers to each, rewards, `advantages` and `objective.policy_loss` exactly as the learner
calls them (T = 1 token), one gradient step. Random numbers depend on the seed and the step alone, so that arms and regimes of equal seed
see the same prompts and the same draws, and differences between them can be taken seed by seed.

The step size is divided by the running root mean square of the gradient's norm (Adam's second moment, arXiv:1412.6980, with one number for
all parameters). An arm whose advantages are just larger than another's gains nothing by it, and a rare preference group's small
gradient stays small, as it does in the shared weights of a language model (Adam by coordinate would blow it up in a table).
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp

from pgrpo_jax.algorithms import advantages, objective, reward_history
from pgrpo_jax.laboratory import environment
from pgrpo_jax.laboratory.environment import Policy, Regime
from pgrpo_jax.structs import RewardHistory

_DECAY = 0.95  # of the running second moment of the gradient's norm, a step


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
        advantage: key of `advantages.ESTIMATORS`.
        learning_rate: length of a typical step in the space of logits.
    """

    advantage: str
    learning_rate: float


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
    square: chex.Array  # running second moment of the gradient's norm


@chex.dataclass(frozen=True, mappable_dataclass=False)
class _Batch:
    contexts: chex.Array  # [N]
    preference_ids: chex.Array  # [N]
    prompt_index: chex.Array  # [N]
    actions: chex.Array  # [N]
    rewards: chex.Array  # [N]


@functools.partial(jax.jit, static_argnames=("arm", "budget"))
def train(arm: Arm, regimes: Regime, seeds: chex.Array, budget: Budget) -> Outcome:
    """Trains one arm in every regime from every seed.

    Args:
        arm: the algorithm.
        regimes: `Regime` with a leading axis of E regimes.
        seeds: [M] int32.
        budget: how much is trained.

    Returns:
        `Outcome` with leading axes [E, M]; the same to the bit every time.
    """
    one = functools.partial(_train_one, arm, budget)
    # One regime after the other: what 200 seeds hold at a time stays in the cache.
    return jax.lax.map(lambda regime: jax.vmap(one, in_axes=(None, 0))(regime, seeds), regimes)


def _train_one(arm: Arm, budget: Budget, regime: Regime, seed: chex.Array) -> Outcome:
    """`Outcome` of one seed in one regime."""
    sizes = {"num_contexts": budget.num_contexts, "num_actions": budget.num_actions}
    num_preference_groups = regime.shares.shape[0]
    world_key, steps_key = jax.random.split(jax.random.key(seed))
    utilities = environment.utilities(world_key, regime, **sizes)
    state = _State(
        policy=environment.initial_policy(num_preference_groups, **sizes),
        history=reward_history.init(num_preference_groups),
        square=jnp.zeros(()),
    )

    def step(state: _State, number: chex.Array) -> tuple[_State, tuple[chex.Array, ...]]:
        key = jax.random.fold_in(steps_key, number)
        return _step(arm, budget, regime, utilities, state, key, number)

    _, (curve, share, scale, bias, defined) = jax.lax.scan(step, state, jnp.arange(budget.num_steps, dtype=jnp.int32))
    times = jnp.maximum(jnp.sum(defined, axis=0), 1).astype(scale.dtype)
    mean = [jnp.sum(jnp.where(defined, x, 0), axis=0) / times for x in (scale, bias)]
    return Outcome(curve=curve, gradient_share=jnp.mean(share, axis=0), scale=mean[0], bias=mean[1])


def _step(
    arm: Arm, budget: Budget, regime: Regime, utilities: chex.Array, state: _State, key: chex.PRNGKey, number: chex.Array
) -> tuple[_State, tuple[chex.Array, ...]]:
    """One update, and what is recorded of it."""
    table = environment.log_probs(state.policy, regime.visibility)
    batch = _draw(budget, regime, utilities, jnp.exp(table), key)
    mask = jnp.ones_like(batch.rewards, dtype=bool)
    advantage, history, diagnostics = advantages.ESTIMATORS[arm.advantage](
        batch.rewards, batch.prompt_index, batch.preference_ids, mask, state.history,
        num_prompts=budget.prompts_per_step, epsilon=1e-6, std_floor=1e-3, min_count=4 * budget.completions_per_prompt,
    )
    by_preference = jax.grad(_loss)(table, batch, advantage)
    gradient = Policy(shared=jnp.sum(by_preference, axis=0), own=regime.visibility * by_preference)
    policy, square = _descend(state.policy, gradient, state.square, number, arm.learning_rate)
    # Every parameter of the policy sees the gradient of the logits, the preference group's own ones v times it.
    norms = jnp.sqrt(jnp.sum(by_preference**2, axis=(1, 2)))
    share = norms / jnp.maximum(jnp.sum(norms), 1e-30)
    curve = environment.normalised_rewards(environment.log_probs(policy, regime.visibility), utilities)
    defined = (diagnostics.batch_count > 0) & (diagnostics.advantage_scale > 0)
    return _State(policy=policy, history=history, square=square), (
        curve, share, diagnostics.advantage_scale, diagnostics.bias, defined,
    )


def _draw(budget: Budget, regime: Regime, utilities: chex.Array, probabilities: chex.Array, key: chex.PRNGKey) -> _Batch:
    """Prompts, their answers and their rewards; G neighbouring rows answer the same prompt."""
    num_prompts, each = budget.prompts_per_step, budget.completions_per_prompt
    size = num_prompts * each
    uniform = jax.random.uniform(key, (2 * num_prompts + 3 * size,))
    who, what, act, succeed, noise = jnp.split(uniform, [num_prompts, 2 * num_prompts, 2 * num_prompts + size, 2 * num_prompts + 2 * size])
    spread = functools.partial(jnp.repeat, repeats=each, total_repeat_length=size)
    preference_ids = spread(environment.draw_from(jnp.broadcast_to(regime.shares, (num_prompts, regime.shares.shape[0])), who))
    contexts = spread((what * budget.num_contexts).astype(jnp.int32))
    actions = environment.draw_from(probabilities[preference_ids, contexts], act)
    normal = jax.scipy.special.ndtri(jnp.clip(noise, 1e-7, 1 - 1e-7))
    rewards = environment.observed_rewards(regime, utilities[preference_ids, contexts, actions], preference_ids, succeed, normal)
    prompt_index = spread(jnp.arange(num_prompts, dtype=jnp.int32))
    return _Batch(contexts=contexts, preference_ids=preference_ids, prompt_index=prompt_index, actions=actions, rewards=rewards)


def _loss(logits: chex.Array, batch: _Batch, advantage: chex.Array) -> chex.Array:
    """−J of a step as a function of the logits of every preference group and context, [K, X, A]."""
    chosen = jax.nn.log_softmax(logits, axis=-1)[batch.preference_ids, batch.contexts, batch.actions][:, None]
    every = jnp.ones_like(chosen, dtype=bool)
    loss_sum, count, _ = objective.policy_loss(
        chosen, jax.lax.stop_gradient(chosen), None, advantage, every, every[:, 0], clip_low=0.2, clip_high=0.2, kl_coefficient=0.0
    )
    return loss_sum / count


def _descend(
    policy: Policy, gradient: Policy, square: chex.Array, number: chex.Array, learning_rate: float
) -> tuple[Policy, chex.Array]:
    """One step against the gradient, its length scaled by the running root mean square of the gradient's norm."""
    norm2 = jnp.sum(gradient.shared**2) + jnp.sum(gradient.own**2)
    square = _DECAY * square + (1 - _DECAY) * norm2
    unbiased = square / (1 - _DECAY ** (number.astype(square.dtype) + 1))
    length = learning_rate / jnp.sqrt(jnp.maximum(unbiased, 1e-30))
    return jax.tree.map(lambda p, g: p - length * g, policy, gradient), square
