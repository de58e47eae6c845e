"""Scoring: against a plain forward over prompt + completion rows, value and gradient; and against the sampler's own log-probs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgrpo_jax import batching
from pgrpo_jax.generation import engine, sampler, scoring
from pgrpo_jax.generation.sampler import Support
from pgrpo_jax.models import transformer
from pgrpo_jax.models.config import ModelConfig
from pgrpo_jax.models.parameters import parameter_shapes
from pgrpo_jax.structs import TrainBatch

CONFIG = ModelConfig(
    num_layers=2, width=16, mlp_width=24, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=23, context_length=64, rope_theta=100.0,
    norm_epsilon=1e-5, tied_embeddings=True,
)  # fmt: skip
PROMPT_LENGTHS = (1, 6, 3, 4)
score = jax.jit(scoring.score, static_argnums=(0, 3))


def draw_params(dtype=np.float32):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda spec: rng.normal(0, 0.4, spec.shape).astype(dtype), parameter_shapes(CONFIG))


def make_batch(prompts, prompt_lengths, completions, completion_lengths):
    """A batch of which scoring reads the prompts and completions only."""
    rows, size = completions.shape
    return TrainBatch(
        prompts=np.asarray(prompts, np.int32),
        prompt_lengths=np.asarray(prompt_lengths, np.int32),
        preference_ids=np.zeros(len(prompts), np.int32),
        completions=np.asarray(completions, np.int32),
        completion_mask=np.arange(size)[None, :] < np.asarray(completion_lengths)[:, None],
        prompt_index=np.repeat(np.arange(len(prompts), dtype=np.int32), rows // len(prompts)),
        behaviour_log_probs=np.zeros((rows, size), np.float32),
        rewards=np.zeros(rows, np.float32),
        valid=np.ones(rows, bool),
    )


def uneven_batch():
    rng = np.random.default_rng(1)
    prompts, completions = rng.integers(0, 23, (4, 6)), rng.integers(0, 23, (8, 5))
    return make_batch(prompts, PROMPT_LENGTHS, completions, (5, 1, 3, 4, 2, 5, 4, 1))


def plain_score(model, params, batch, support):
    """Each completion behind its own copy of its prompt, in one forward pass without context."""
    width = batch.prompts.shape[1] + batch.completions.shape[1]
    rows = np.zeros((len(batch.prompt_index), width), np.int32)
    starts = batch.prompt_lengths[batch.prompt_index]
    for row, p, start, completion in zip(rows, batch.prompt_index, starts, batch.completions):
        row[: start + len(completion)] = [*batch.prompts[p, :start], *completion]
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), rows.shape)
    hidden, _ = transformer.forward(model, params, rows, positions)
    places = starts[:, None] - 1 + np.arange(batch.completions.shape[1])[None, :]
    chosen = jnp.take_along_axis(hidden, jnp.asarray(places[..., None], jnp.int32), axis=1)
    return sampler.log_probs(transformer.logits(params, chosen), jnp.asarray(batch.completions), support)


def gradients(function, model, params, batch):
    """The gradient of each completion's own sum of log-probs (each token with another weight), stacked on a leading axis."""
    factors = np.where(batch.completion_mask, 1.0 + np.arange(batch.completions.shape[1])[None, :], 0.0)

    @jax.jit
    def compute(params):
        scores, pull = jax.vjp(lambda p: function(model, p, batch, Support(temperature=0.8))[0], params)
        rows = np.eye(len(factors))[:, :, None] * factors[None]
        return jax.vmap(lambda row: pull(row)[0])(jnp.asarray(rows, scores.dtype))

    return compute(params)


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-10)])
def test_gradients_through_a_shared_prompt_equal_those_of_a_prompt_for_each(dtype, tolerance):
    with jax.enable_x64(dtype == np.float64):
        model, params, batch = transformer.Transformer(CONFIG, dtype=jnp.dtype(dtype)), draw_params(dtype), uneven_batch()
        ours, expected = (gradients(function, model, params, batch) for function in (scoring.score, plain_score))
        for n in range(8):
            difference = jax.tree.map(lambda a, b: np.sum(np.square(a[n] - b[n], dtype=np.float64)), ours, expected)
            size = jax.tree.map(lambda b: np.sum(np.square(b[n], dtype=np.float64)), expected)
            relative = np.sqrt(sum(jax.tree.leaves(difference)) / sum(jax.tree.leaves(size)))
            assert relative <= tolerance, (n, relative)


def packed_batch(size=5, per_prompt=6, seed=3):
    """Six completions of each of four prompts in two rows of ten tokens; two are empty, one is of full length."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 5, 4 * per_prompt)
    lengths[[0, 1, 7]] = 0, size, 0
    prompts, completions = rng.integers(0, 23, (4, 6)), rng.integers(0, 23, (4 * per_prompt, size))
    return batching.pack(make_batch(prompts, PROMPT_LENGTHS, completions, lengths))


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-10)])
def test_packed_completions_have_the_scores_and_gradients_of_a_row_for_each(dtype, tolerance):
    support = Support(temperature=0.7, top_k=5, top_p=0.9)

    def found(function, dtype):
        with jax.enable_x64(dtype == np.float64):
            model, params, batch = transformer.Transformer(CONFIG, dtype=jnp.dtype(dtype)), draw_params(dtype), packed_batch()
            assert batch.packing.shape == (4, 2, 10) and batch.completion_mask.sum() > 30
            scores = jax.jit(lambda params: function(model, params, batch, support))(params)
            return batch, jax.device_get((scores, jax.tree.leaves(gradients(function, model, params, batch))))

    (batch, (scores, gradient)), (_, (others, exact)) = found(scoring.score, dtype), found(plain_score, np.float64)
    for mine, other in zip(scores, others):
        np.testing.assert_allclose(mine, np.where(batch.completion_mask, other, 0), atol=tolerance)
    for n in np.flatnonzero(batch.completion_mask.any(axis=1)):
        mine, other = (np.concatenate([leaf[n].astype(np.float64).ravel() for leaf in leaves]) for leaves in (gradient, exact))
        relative = np.linalg.norm(mine - other) / np.linalg.norm(other)
        assert relative <= tolerance, (n, relative)


def test_packed_neighbours_do_not_see_each_other():
    model, params, batch = transformer.Transformer(CONFIG), draw_params(), packed_batch()
    before, length = score(model, params, batch, Support())[0], batch.completion_mask.sum(axis=1)
    for n in np.flatnonzero(length > 1):
        tokens = batch.completions.copy()
        tokens[n, 0] = (tokens[n, 0] + 1) % 23
        moved = np.any(np.asarray(score(model, params, batch.replace(completions=tokens), Support())[0]) != before, axis=1)
        assert np.flatnonzero(moved).tolist() == [n]


@pytest.mark.parametrize("support", [Support(), Support(temperature=0.7, top_k=5, top_p=0.9)])
def test_scores_equal_those_of_a_prompt_for_each(support):
    model, params, batch = transformer.Transformer(CONFIG), draw_params(), uneven_batch()
    ours = score(model, params, batch, support)
    expected = jax.jit(lambda p: plain_score(model, p, batch, support))(params)
    for mine, other in zip(ours, expected):
        assert mine.shape == (8, 5) and np.abs(other).max() > 0.5
        np.testing.assert_allclose(mine, other, atol=1e-5)


@pytest.mark.parametrize(
    "support",
    [
        Support(),
        Support(temperature=0.6),
        Support(temperature=1.7, top_k=5),
        Support(top_p=0.8),
        Support(temperature=0.7, top_k=9, top_p=0.6),
        Support(top_k=1),
    ],
    ids=lambda s: f"T={s.temperature} k={s.top_k} p={s.top_p}",
)
def test_the_learner_scores_what_the_sampler_drew_alike(support):
    """The bound that importance weights rest on: on policy their ratio is 1 within 1e-5."""
    model, params = transformer.Transformer(CONFIG), draw_params()
    what = engine.GenerationSettings(max_new_tokens=8, support=support, stop_ids=(0,), pad_id=2, prompt_buckets=(6,))
    prompts, lengths = engine.pad_prompts([[3], [1, 2, 3, 4, 5, 6], [7, 8, 22]], buckets=what.prompt_buckets, pad_id=what.pad_id)
    out = engine.generate(model, params, prompts, lengths, jax.random.key(1), completions_per_prompt=16, settings=what)
    batch = make_batch(prompts, lengths, out.tokens, out.lengths)
    learner = np.asarray(score(model, params, batch, support)[0])
    gap = np.abs(learner - out.log_probs)[batch.completion_mask]
    assert gap.size > 100 and gap.max() <= 1e-5
    if support.top_k != 1:
        assert np.abs(learner[batch.completion_mask]).max() > 0.5


def test_padding_is_finite_and_reaches_no_score_and_no_gradient():
    model, params, batch = transformer.Transformer(CONFIG), draw_params(), uneven_batch()
    rubbish = np.where(batch.completion_mask, batch.completions, 22 - batch.completions)
    prompts = np.where(np.arange(6)[None, :] < batch.prompt_lengths[:, None], batch.prompts, 22 - batch.prompts)
    other = batch.replace(completions=rubbish, prompts=prompts)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradient(model, params, batch):
        def total(params):
            scores, entropies = scoring.score(model, params, batch, Support(top_k=7))
            return jnp.sum(jnp.where(batch.completion_mask, scores, jnp.float32(0))), (scores, entropies)

        return jax.value_and_grad(total, has_aux=True)(params)

    (_, scored), gradient = value_and_gradient(model, params, batch)
    (_, rescored), other_gradient = value_and_gradient(model, params, other)
    assert all(np.all(np.isfinite(x)) for x in [*scored, *rescored])
    for mine, its in zip(scored, rescored):
        np.testing.assert_array_equal(np.asarray(mine)[batch.completion_mask], np.asarray(its)[batch.completion_mask])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max()), gradient, other_gradient)
