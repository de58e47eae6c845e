"""The sampling distribution: against definitions written in NumPy, float64, and a million draws."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from pgrpo_jax.generation import sampler
from pgrpo_jax.generation.sampler import Support

BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))
SUPPORTS = [
    Support(),
    Support(temperature=0.5),
    Support(temperature=2.0, top_k=7),
    Support(temperature=0.8, top_p=0.7),
    Support(temperature=1.3, top_k=9, top_p=0.85),
]
sample = jax.jit(sampler.sample, static_argnums=2)
log_probs = jax.jit(sampler.log_probs, static_argnums=2)
restrict = jax.jit(sampler.restrict, static_argnums=1)


def named(support):
    return f"T={support.temperature} k={support.top_k} p={support.top_p}"


def kept_tokens(logits, support):
    """Indices of one row's support, by walking down the ranking; tokens tied with the last one kept are kept."""
    scaled = np.asarray(logits, np.float64) / support.temperature
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    if support.top_k:
        order = [i for i in order if scaled[i] >= scaled[order[min(support.top_k, len(order)) - 1]]]
    weights = np.exp(scaled[order] - scaled[order[0]])
    mass, last = 0.0, len(order) - 1
    for rank, p in enumerate(weights / weights.sum()):
        mass += p
        if mass >= support.top_p:
            last = rank
            break
    return [i for i in order if scaled[i] >= scaled[order[last]]] if support.top_p < 1 else order


def probabilities(logits, support):
    """Exact probabilities [V] of one row."""
    kept = kept_tokens(logits, support)
    scaled = np.asarray(logits, np.float64) / support.temperature
    out = np.zeros(len(scaled))
    out[kept] = np.exp(scaled[kept] - scaled[kept].max())
    return out / out.sum()


@pytest.mark.parametrize("support", [Support(top_k=1), Support(temperature=0.7, top_p=1e-6)], ids=named)
def test_logits_that_are_products_keep_their_largest(support):
    """As those of 8-bit weights: a compiler that makes product and difference one rounded operation, here and not there, left no token at all."""
    rng = np.random.default_rng(2)
    integers, scales = rng.integers(-20_000, 20_000, (64, 31)).astype(np.float32), rng.uniform(1e-4, 2e-4, 31).astype(np.float32)
    drawn = jax.jit(lambda x, scales, uniforms: sampler.sample(x * scales[None], uniforms, support))
    tokens, found = drawn(integers, scales, rng.uniform(size=64).astype(np.float32))
    np.testing.assert_array_equal(tokens, (integers * scales).argmax(axis=1))
    np.testing.assert_allclose(found, 0, atol=1e-6)


@pytest.mark.parametrize("support", SUPPORTS, ids=named)
def test_restriction_equals_its_definition(support):
    logits = np.random.default_rng(1).normal(0, 2, (40, 31)).astype(np.float32)
    ours = np.asarray(restrict(logits, support))
    for row, out in zip(logits, ours):
        np.testing.assert_array_equal(np.flatnonzero(out > -np.inf), sorted(kept_tokens(row, support)))
        np.testing.assert_allclose(out[out > -np.inf], ((row - row.max()) / support.temperature)[out > -np.inf], rtol=1e-6)


@pytest.mark.parametrize(
    "logits, support, kept",
    [
        ([2, 1, 1, 0], Support(top_k=2), [0, 1, 2]),  # tied with the second
        ([0, 0, 0], Support(top_k=1), [0, 1, 2]),
        ([3, 2, 1], Support(top_k=3), [0, 1, 2]),
        ([3, 2, 1], Support(top_k=99), [0, 1, 2]),
        ([0, 0, 0, 0], Support(top_p=0.1), [0, 1, 2, 3]),
        ([5, 5, -5, -5], Support(top_p=0.5), [0, 1]),
        (np.log([0.5, 0.25, 0.15, 0.1]), Support(top_p=0.6), [0, 1]),
        (np.log([0.5, 0.25, 0.15, 0.1]), Support(top_p=1e-9), [0]),
        (np.log([0.1, 0.15, 0.25, 0.5]), Support(top_p=0.89), [1, 2, 3]),
        # 0.4 / 0.7 = 0.57 of what top-k leaves, but 0.4 of the whole
        (np.log([0.4, 0.3, 0.2, 0.1]), Support(top_k=2, top_p=0.5), [0]),
        ([-np.inf, 1, 0, -np.inf], Support(top_k=3), [1, 2]),
        ([-np.inf, 1, 0, -np.inf], Support(top_p=0.999), [1, 2]),
        ([7], Support(top_k=1, top_p=0.5), [0]),
    ],
)
def test_ties_and_edges_of_the_support(logits, support, kept):
    out = np.asarray(restrict(np.array([logits], np.float32), support))[0]
    np.testing.assert_array_equal(np.flatnonzero(out > -np.inf), kept)


def test_the_token_kept_by_force_counts_in_the_denominator():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    for support in (Support(top_k=2), Support(top_p=0.7)):
        scores = np.asarray(log_probs(np.repeat(logits[:, None], 4, axis=1), np.arange(4, dtype=np.int32)[None], support)[0])[0]
        np.testing.assert_allclose(scores, np.log([0.5 / 0.8, 0.3 / 0.8, 0.15 / 0.95, 0.05 / 0.85]), rtol=1e-5)


@pytest.mark.parametrize("support", SUPPORTS, ids=named)
def test_a_million_draws_follow_the_exact_probabilities(support):
    vocab, size = 37, 250_000  # a prime
    logits = np.random.default_rng(2).normal(0, 1, vocab).astype(np.float32)
    expected = probabilities(logits, support)
    counts = np.zeros(vocab)
    rows = np.broadcast_to(logits, (size, vocab))
    for part in range(4):
        uniforms = np.random.default_rng([3, part]).random(size, np.float32)
        counts += np.bincount(sample(rows, uniforms, support)[0], minlength=vocab)
    support_size = np.count_nonzero(expected)
    assert counts.sum() == 1e6 and counts[expected == 0].sum() == 0 and 1e6 * expected[expected > 0].min() > 20
    chi_square = np.sum((counts - 1e6 * expected)[expected > 0] ** 2 / (1e6 * expected[expected > 0]))
    assert 1e-3 < scipy.stats.chi2.sf(chi_square, support_size - 1) < 1 - 1e-3


@pytest.mark.parametrize("vocab", [1, 2, 3, 4, 5, 13, 16, 17, 101, 1000])
def test_each_draw_inverts_the_cumulative_distribution(vocab):
    """Every token owns an interval of [0, 1), in order of ids; only uniforms within rounding of an end may differ."""
    rng = np.random.default_rng(vocab)
    logits, uniforms = rng.normal(0, 2, (512, vocab)).astype(np.float32), rng.random(512, np.float32)
    tokens, scores = (np.asarray(x) for x in sample(logits, uniforms, Support()))
    assert tokens.dtype == np.int32
    for row, u, token, score in zip(logits, uniforms, tokens, scores):
        p = probabilities(row, Support())
        ends = np.cumsum(p)
        assert ends[token] - p[token] - 1e-5 <= u <= ends[token] + 1e-5
        np.testing.assert_allclose(score, np.log(p[token]), rtol=1e-5, atol=1e-6)


def extreme_rows(vocab):
    """Rows of logits that leave a single token, or few, or differ by more than float32's exponent."""
    rng = np.random.default_rng(vocab)
    only = np.full((vocab, vocab), -np.inf)
    np.fill_diagonal(only, 3.0)
    peaked = np.full((vocab, vocab), -1e4)
    np.fill_diagonal(peaked, 1e4)
    holes = rng.normal(0, 2, (32, vocab))
    holes[:, 1:][rng.random((32, vocab - 1)) < 0.7] = -np.inf
    steep = np.broadcast_to(np.linspace(-1e4, 1e4, vocab), (2, vocab)) * [[1], [-1]]
    flat = np.full((3, vocab), [[1e4], [-1e4], [0.0]])
    return np.concatenate([only, peaked, holes, steep, flat]).astype(np.float32)


@pytest.mark.parametrize("vocab", [1, 2, 9, 97])
def test_no_draw_leaves_the_support(vocab):
    logits = extreme_rows(vocab)
    for support in (Support(), Support(temperature=0.05), Support(temperature=1.5, top_k=3, top_p=0.9)):
        kept = np.asarray(restrict(logits, support)) > -np.inf
        for u in (0.0, 1e-45, 1e-7, 0.5, 0.99999, BELOW_ONE):
            tokens, scores = (np.asarray(x) for x in sample(logits, np.full(len(logits), u, np.float32), support))
            assert np.all((tokens >= 0) & (tokens < vocab)), (support, u)
            assert np.all(kept[np.arange(len(logits)), tokens]), (support, u)
            assert np.all(np.isfinite(scores)) and np.all(scores <= 0), (support, u)


def test_rounding_of_a_long_sum_leads_to_no_token_of_probability_zero():
    """A parallel prefix sum is not monotonic: it may creep past a target where nothing was added."""
    rng = np.random.default_rng(7)
    weights = np.where(rng.random(1024) < 0.3, np.exp(rng.normal(0, 2, 1024)), 0).astype(np.float32)
    rows = np.broadcast_to(weights, (1024, 1024))
    targets = np.asarray(jax.jit(lambda x: jnp.cumsum(x, axis=-1))(rows))[0]
    index, rest = (np.asarray(x) for x in jax.jit(sampler._first_above)(rows, targets))
    assert np.all(weights[index] > 0) and np.all(rest >= 0)
    exact = np.cumsum(weights, dtype=np.float64)
    assert np.all((exact - weights)[index] <= targets * (1 + 1e-5)) and np.all(exact[index] >= targets * (1 - 1e-5))


@pytest.mark.parametrize("support", SUPPORTS, ids=named)
def test_sampler_and_learner_score_alike_and_share_one_support(support):
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 2, (300, 41)).astype(np.float32)
    tokens, scores = sample(logits, rng.random(300, np.float32), support)
    learner, entropies = log_probs(logits[:, None], tokens[:, None], support)
    np.testing.assert_allclose(learner[:, 0], scores, atol=1e-6)  # they add up in another order
    for row, token, score, entropy in zip(logits, np.asarray(tokens), np.asarray(scores), np.asarray(entropies)[:, 0]):
        p = probabilities(row, support)
        np.testing.assert_allclose(score, np.log(p[token]), atol=2e-6)
        np.testing.assert_allclose(entropy, -np.sum(p[p > 0] * np.log(p[p > 0])), atol=2e-6)


def test_entropies_in_closed_form():
    def entropy(logits, support=Support()):
        return float(log_probs(np.array(logits, np.float32)[None, None], np.zeros((1, 1), np.int32), support)[1][0, 0])

    for level in (0.0, 1e4, -1e4):  # float32 is spaced by 1e-3 at 1e4
        assert entropy(np.full(11, level)) == pytest.approx(math.log(11), rel=1e-6)
    assert entropy([2.0]) == 0.0
    assert entropy([0.0, -np.inf]) == 0.0
    assert entropy([1e4, -1e4]) == 0.0
    assert entropy(np.log([0.9, 0.1])) == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1), rel=1e-5)
    assert entropy(np.zeros(8), Support(temperature=3.0)) == pytest.approx(math.log(8), rel=1e-6)
    assert entropy([5.0, 5.0, 0.0], Support(top_k=2)) == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("support", SUPPORTS, ids=named)
def test_gradient_of_a_log_prob_is_one_hot_minus_probabilities(support):
    """Over temperature, on the support; 0 outside, also where a logit is -inf: the threshold itself has no gradient."""
    logits = np.random.default_rng(5).normal(0, 2, 31).astype(np.float32)
    logits[[4, 20]] = -np.inf
    token = int(np.argmax(logits))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(sampler.log_probs(x[None, None], jnp.full((1, 1), token), support)[0])))(logits)
    expected = (np.eye(31)[token] - probabilities(logits, support)) / support.temperature
    np.testing.assert_allclose(gradient, expected, atol=2e-6)


def test_a_draw_depends_on_its_own_row_only():
    rng = np.random.default_rng(6)
    logits, uniforms = rng.normal(0, 2, (6, 19)).astype(np.float32), rng.random(6, np.float32)
    other_logits, other_uniforms = rng.normal(0, 9, (6, 19)).astype(np.float32), rng.random(6, np.float32)
    other_logits[2], other_uniforms[2] = logits[2], uniforms[2]
    support = Support(top_k=9, top_p=0.9)
    for ours, other in zip(sample(logits, uniforms, support), sample(other_logits, other_uniforms, support)):
        assert ours[2] == other[2]
