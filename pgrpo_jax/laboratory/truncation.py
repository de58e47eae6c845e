"""Floor 1: what each correction of an off-policy batch costs in bias and buys in variance, by exact expectation.

All answers of a small world are enumerated. For a completion c the gradient g(c) of `objective.policy_loss` is taken, with the
correction's weight π/π_behaviour, and averaged over c ~ π_behaviour. Without a bound at the level of the sequence that is the on-policy
gradient; what it is otherwise, and how far one completion's gradient scatters, is the table.
"""

import dataclasses
import functools
from typing import Mapping, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from pgrpo_jax.algorithms.importance import Correction
from pgrpo_jax.algorithms.objective import Objective, policy_loss
from pgrpo_jax.laboratory import comparison, sequences


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the world whose answers are enumerated.

    Attributes:
        length: T, tokens of an answer.
        num_tokens: A; A^T answers are enumerated.
        spread: deviation of the policy's logits; 0 = uniform.
    """

    length: int
    num_tokens: int
    spread: float


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Errors:
    """Of one gradient, as shares of the norm of the on-policy gradient.

    Attributes:
        bias: scalar, ‖E g − on-policy gradient‖.
        deviation: scalar, √E‖g − E g‖² for a single completion; of N independent ones it is 1/√N of that.
    """

    bias: chex.Array
    deviation: chex.Array


def table(
    corrections: Mapping[str, Correction], distances: Sequence[float], seeds: Sequence[int], sizes: Sizes
) -> dict[str, dict[float, dict[str, dict[str, float]]]]:
    """Bias and deviation of corrections at several distances between the policy and the one that sampled.

    Args:
        corrections: name -> correction.
        distances: deviations of the noise by which the sampler's logits differ.
        seeds: M whole numbers; each is one policy, one sampler, and one set of rewards.
        sizes: of the world.

    Returns:
        name -> distance -> {"bias", "deviation"} -> {mean, low, high} over the seeds, 95 %. Under the name `GAP`: {"gap": …}, mean
        |Δ log π| a token of the sampler, nats, which a run logs as mismatch/mean.
    """
    numbers = np.asarray(seeds, np.int32)
    found: dict[str, dict[float, dict[str, dict[str, float]]]] = {GAP: {}} | {name: {} for name in corrections}
    for distance in distances:
        found[GAP][distance] = {"gap": _interval(_gaps(sizes, jnp.float32(distance), numbers))}
        for name, correction in corrections.items():
            errors = _errors(correction, sizes, jnp.float32(distance), numbers)
            found[name][distance] = {part: _interval(getattr(errors, part)) for part in ("bias", "deviation")}
    return found


GAP = "mismatch, nats a token"


def _interval(values: chex.Array) -> dict[str, float]:
    return dataclasses.asdict(comparison.interval(np.asarray(values)))


@functools.partial(jax.jit, static_argnames="sizes")
def _gaps(sizes: Sizes, distance: chex.Array, seeds: chex.Array) -> chex.Array:
    def one(seed: chex.Array) -> chex.Array:
        policy, sampler, _ = _world(sizes, distance, seed)
        current, sampled = [_every_log_prob(logits, sizes) for logits in (policy, sampler)]
        return jnp.sum(jnp.exp(jnp.sum(sampled, axis=1)) * jnp.mean(jnp.abs(current - sampled), axis=1))

    return jax.vmap(one)(seeds)


@functools.partial(jax.jit, static_argnames=("correction", "sizes"))
def _errors(correction: Correction, sizes: Sizes, distance: chex.Array, seeds: chex.Array) -> Errors:
    def one(seed: chex.Array) -> Errors:
        policy, sampler, rewards = _world(sizes, distance, seed)
        sampled = _every_log_prob(sampler, sizes)
        probabilities = jnp.exp(jnp.sum(sampled, axis=1))
        # What an endless number of completions of the prompt would be standardised with.
        mean = jnp.sum(probabilities * rewards)
        advantages = (rewards - mean) / jnp.sqrt(jnp.sum(probabilities * (rewards - mean) ** 2))
        each = _gradients(correction, policy, sampled, advantages, sizes)
        own = _every_log_prob(policy, sizes)
        exact = jnp.exp(jnp.sum(own, axis=1)) @ _gradients(Correction(), policy, own, advantages, sizes)
        expected = probabilities @ each
        norm = jnp.linalg.norm(exact)
        deviation = jnp.sqrt(probabilities @ jnp.sum((each - expected[None]) ** 2, axis=1))
        return Errors(bias=jnp.linalg.norm(expected - exact) / norm, deviation=deviation / norm)

    return jax.lax.map(one, seeds)


def _gradients(correction: Correction, policy: chex.Array, sampled: chex.Array, advantages: chex.Array, sizes: Sizes) -> chex.Array:
    """The gradient of the loss of every single completion by the policy's logits, [A^T, T·A·A]."""
    kind = Objective(aggregation="sum", policy_term="log_prob", correction=correction)
    completions = jnp.asarray(sequences.every_completion(sizes.length, sizes.num_tokens))

    def loss(logits: chex.Array, completion: chex.Array, behaviour: chex.Array, advantage: chex.Array) -> chex.Array:
        log_probs = sequences.token_log_probs(logits, jnp.zeros(1, jnp.int32), completion[None])
        nothing, ones = jnp.zeros_like(log_probs), jnp.ones_like(log_probs, bool)
        loss_sum, count, _ = policy_loss(
            log_probs, jax.lax.stop_gradient(log_probs), behaviour[None], None, nothing, advantage[None], nothing[:, 0], ones, ones[:, 0],
            jnp.zeros(1, jnp.int32), objective=kind, num_prompts=1,
        )
        return loss_sum / count

    each = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0, 0))(policy, completions, sampled, advantages)
    return each.reshape(len(completions), -1)


def _every_log_prob(logits: chex.Array, sizes: Sizes) -> chex.Array:
    completions = jnp.asarray(sequences.every_completion(sizes.length, sizes.num_tokens))
    return sequences.token_log_probs(logits, jnp.zeros(len(completions), jnp.int32), completions)


def _world(sizes: Sizes, distance: chex.Array, seed: chex.Array) -> tuple[chex.Array, chex.Array, chex.Array]:
    """The policy's logits and the sampler's, [1, T, A, A], and the reward of every answer, [A^T]."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shape = (1, sizes.length, sizes.num_tokens, sizes.num_tokens)
    policy = sizes.spread * jax.random.normal(keys[0], shape)
    sampler = policy + distance * jax.random.normal(keys[1], shape)
    completions = jnp.asarray(sequences.every_completion(sizes.length, sizes.num_tokens))
    worth = sequences.rewards(jax.random.uniform(keys[2], shape), jnp.zeros(len(completions), jnp.int32), completions)
    return policy, sampler, worth
