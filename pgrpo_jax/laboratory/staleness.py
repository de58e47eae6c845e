"""Floor 1: how stale rollouts and a large learning rate go together, and what each way of using stale rollouts makes of it.

The policy has fewer parameters than logits, L = Σ_f w_f φ_f with fixed random φ, so that what is learnt of one answer moves others, as in a
network. In a table of logits nothing goes wrong: there every treatment, none included, learns from rollouts 32 updates old.

A step trains on completions that the policy of s updates ago sampled (the first s+1 steps: the initial policy), with
`advantages.estimate` and `objective.policy_loss` as the learner calls them. Prompts and the uniform numbers that become answers depend on
seed and step alone, so that differences can be taken seed by seed. The step is `training.descend`'s: its length is the learning rate.

Letters: M seeds, L learning rates, S stalenesses, D the largest one, F parameters, P prompts and N completions of a step.
"""

import concurrent.futures
import dataclasses
import functools
import math
from typing import Any, Mapping, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from pgrpo_jax.algorithms import advantages, memory
from pgrpo_jax.algorithms.advantages import AdvantageSettings
from pgrpo_jax.algorithms.objective import Objective, policy_loss
from pgrpo_jax.laboratory import comparison, sequences, training

_ADVANTAGES = AdvantageSettings(baseline="cohort", scale="cohort")
PROXIMAL = ("generator", "current")


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much is trained.

    Attributes:
        num_steps: updates.
        prompts_per_step: P.
        completions_per_prompt: G.
        num_contexts: prompts there are.
        length: tokens of an answer.
        num_tokens: tokens there are.
        num_features: F, parameters of the policy.
    """

    num_steps: int
    prompts_per_step: int
    completions_per_prompt: int
    num_contexts: int
    length: int
    num_tokens: int
    num_features: int


@dataclasses.dataclass(frozen=True)
class Treatment:
    """One way of using stale completions.

    Attributes:
        objective: of the loss; its correction weighs the proximal policy against the one that sampled.
        proximal: the old policy of the ratio, one of `PROXIMAL`: the weights that sampled, or those before the update.
    """

    objective: Objective
    proximal: str = "current"


@chex.dataclass(frozen=True, mappable_dataclass=False)
class _State:
    weights: chex.Array  # [F]
    past: chex.Array  # [D+1, F], the newest at step mod D+1
    square: chex.Array


def sweep(
    treatments: Mapping[str, Treatment], stalenesses: Sequence[int], learning_rates: Sequence[float], seeds: Sequence[int],
    budget: Budget, *, num_threads: int = 2,
) -> dict[str, np.ndarray]:
    """Trains with every treatment at every staleness and learning rate.

    Args:
        treatments: name -> treatment.
        stalenesses: S whole numbers, updates between the weights that sample and those that are trained; 0 = on-policy.
        learning_rates: L numbers, lengths of a typical step in the space of parameters.
        seeds: M whole numbers.
        budget: how much is trained.
        num_threads: treatments trained at a time; the outcome does not depend on it.

    Returns:
        name -> [S, L, M] float32, true reward after the last update: 0 = random answers, 1 = the best ones. The same to the bit every time.

    Raises:
        ValueError: where a proximal policy is not among `PROXIMAL`.
    """
    for name, treatment in treatments.items():
        if treatment.proximal not in PROXIMAL:
            raise ValueError(f"{name}: proximal is {treatment.proximal!r}, must be one of {', '.join(PROXIMAL)}: change the treatment")
    grid = (jnp.asarray(stalenesses, jnp.int32), jnp.asarray(learning_rates, jnp.float32), jnp.asarray(seeds, jnp.int32))

    def train(treatment: Treatment) -> np.ndarray:
        return np.asarray(_train(treatment, budget, max(stalenesses) + 1, *grid))

    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        return dict(zip(treatments, pool.map(train, treatments.values()), strict=True))


def report(found: Mapping[str, np.ndarray], stalenesses: Sequence[int], learning_rates: Sequence[float]) -> dict[str, Any]:
    """Intervals over the seeds of what `sweep` returned: name -> staleness -> learning rate -> {mean, low, high}, 95 %; JSON-serialisable."""
    return {
        name: {
            str(s): {f"{rate:g}": dataclasses.asdict(comparison.interval(rewards[i, j])) for j, rate in enumerate(learning_rates)}
            for i, s in enumerate(stalenesses)
        }
        for name, rewards in found.items()
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 2), compiler_options={"xla_backend_optimization_level": 1})
def _train(
    treatment: Treatment, budget: Budget, kept: int, stalenesses: chex.Array, learning_rates: chex.Array, seeds: chex.Array
) -> chex.Array:
    shape = (budget.num_contexts, budget.length, budget.num_tokens, budget.num_tokens)
    features = jax.random.normal(jax.random.key(0), (budget.num_features, *shape)) / math.sqrt(budget.num_features)  # one network for all
    one = functools.partial(_train_one, treatment, budget, kept, features)
    by_seed = jax.vmap(one, in_axes=(None, None, 0))
    return jax.lax.map(lambda s: jax.lax.map(lambda rate: by_seed(s, rate, seeds), learning_rates), stalenesses)


def _train_one(
    treatment: Treatment, budget: Budget, kept: int, features: chex.Array, staleness: chex.Array, learning_rate: chex.Array, seed: chex.Array
) -> chex.Array:
    """The final reward of one seed."""
    world_key, steps_key = jax.random.split(jax.random.key(seed))
    utilities = jax.random.uniform(world_key, features.shape[1:])
    start = jnp.zeros(budget.num_features)

    def step(state: _State, number: chex.Array) -> tuple[_State, None]:
        logits, back = jax.vjp(lambda weights: jnp.tensordot(weights, features, 1), state.weights)
        behaviour = jnp.tensordot(state.past[jnp.maximum(number - staleness, 0) % kept], features, 1)
        (gradient,) = back(_gradient(treatment, budget, utilities, logits, behaviour, jax.random.fold_in(steps_key, number)))
        weights, square = training.descend(state.weights, gradient, state.square, number, learning_rate)
        return _State(weights=weights, past=state.past.at[(number + 1) % kept].set(weights), square=square), None

    state = _State(weights=start, past=jnp.tile(start, (kept, 1)), square=jnp.zeros(()))
    state, _ = jax.lax.scan(step, state, jnp.arange(budget.num_steps, dtype=jnp.int32))
    return sequences.normalised_reward(jnp.tensordot(state.weights, features, 1), utilities)


def _gradient(
    treatment: Treatment, budget: Budget, utilities: chex.Array, logits: chex.Array, behaviour: chex.Array, key: chex.PRNGKey
) -> chex.Array:
    """The gradient of a step's loss by the logits; the behaviour policy samples the batch."""
    prompts, size = budget.prompts_per_step, budget.prompts_per_step * budget.completions_per_prompt
    what, act = jnp.split(jax.random.uniform(key, (prompts + size * budget.length,)), [prompts])
    prompt_index = jnp.repeat(jnp.arange(prompts, dtype=jnp.int32), budget.completions_per_prompt, total_repeat_length=size)
    contexts = (what * budget.num_contexts).astype(jnp.int32)[prompt_index]
    completions = sequences.draw(behaviour, contexts, act.reshape(size, budget.length))
    nobody, everywhere = jnp.zeros_like(contexts), jnp.ones(completions.shape, bool)
    advantage, _, _ = advantages.estimate(
        sequences.rewards(utilities, contexts, completions), prompt_index, nobody, nobody, nobody, everywhere[:, 0],
        memory.init(_ADVANTAGES.memory, 1, jnp.float32), settings=_ADVANTAGES, num_prompts=prompts,
    )
    sampled = sequences.token_log_probs(behaviour, contexts, completions)

    def loss(logits: chex.Array) -> chex.Array:
        own = sequences.token_log_probs(logits, contexts, completions)
        old = sampled if treatment.proximal == "generator" else jax.lax.stop_gradient(own)
        nothing = jnp.zeros_like(own)
        loss_sum, count, _ = policy_loss(
            own, old, sampled, None, nothing, advantage, nothing[:, 0], everywhere, everywhere[:, 0], prompt_index,
            objective=treatment.objective, num_prompts=prompts,
        )
        return loss_sum / count

    return jax.grad(loss)(logits)
