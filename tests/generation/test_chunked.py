"""Chunked log-probs against `sampler.log_probs` of whole logits: values and gradients, and that whole logits never exist."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgrpo_jax.generation import chunked, sampler
from pgrpo_jax.generation.sampler import Support
from pgrpo_jax.models import transformer

N, T, D, V = 3, 7, 6, 41
SUPPORTS = [Support(), Support(temperature=0.7), Support(top_k=9), Support(temperature=1.3, top_p=0.6), Support(top_k=5, top_p=0.8), Support(top_k=1)]


def case(name, dtype=np.float64):
    rng = np.random.default_rng(3)
    head = rng.normal(0, 1, (D, V) if name == "head" else (V, D))
    params = {"embedding": rng.normal(0, 1, (V, D)).astype(dtype)} | {name: head.astype(dtype)}
    return params, rng.normal(0, 1, (N, T, D)).astype(dtype), rng.integers(0, V, (N, T)).astype(np.int32)


def whole(params, hidden, tokens, support, soft_cap=0.0):
    return sampler.log_probs(transformer.logits(params, hidden, soft_cap), tokens, support)


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
@pytest.mark.parametrize("name", ["embedding", "head"])
@pytest.mark.parametrize("most", [1, N * V * 3, 2**25], ids=["a position", "three positions, the last chunk filled up", "all"])
def test_values_and_gradients_equal_those_of_whole_logits(support, name, most, monkeypatch):
    equal(support, name, most, 0.0, monkeypatch)


@pytest.mark.parametrize("support", SUPPORTS[1:5], ids=str)
@pytest.mark.parametrize("name", ["embedding", "head"])
def test_capped_logits(support, name, monkeypatch):
    """Logits of 5 and more under a cap of 2: most of them lie where it bends."""
    equal(support, name, N * V * 3, 2.0, monkeypatch)


def equal(support, name, most, soft_cap, monkeypatch):
    monkeypatch.setattr(chunked, "MOST_LOGITS", most)
    with jax.enable_x64(True):
        params, hidden, tokens = case(name)
        rng = np.random.default_rng(5)
        pull = (rng.normal(size=(N, T)), rng.normal(size=(N, T)))

        def results(score):
            values, vjp = jax.vjp(lambda params, hidden: score(params, hidden, tokens, support, soft_cap), params, hidden)
            return values, vjp(pull)

        ours, theirs = jax.jit(lambda: results(chunked.log_probs))(), jax.jit(lambda: results(whole))()
        assert np.abs(theirs[1][0][name]).max() > 0.1
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), ours, theirs)


def test_large_logits_keep_their_precision():
    """Logits of several hundred: log-probs are differences of large numbers, and still exact to float32's last digits."""
    params, hidden, tokens = case("embedding", np.float32)
    hidden = hidden * 100
    exact = whole_in_float64(params, hidden, tokens)
    ours, entropies = jax.jit(lambda: chunked.log_probs(params, hidden, tokens, Support()))()
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-4)
    assert np.all(np.isfinite(entropies)) and np.all(np.asarray(entropies) >= -1e-5)


def whole_in_float64(params, hidden, tokens):
    logits = hidden.astype(np.float64) @ params["embedding"].astype(np.float64).T
    top = logits.max(-1, keepdims=True)
    scores = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return np.take_along_axis(scores, tokens[..., None], -1)[..., 0]


def test_bfloat16_gradients_are_those_of_whole_logits_up_to_rounding():
    params, hidden, tokens = case("embedding", np.float32)
    hidden = jnp.asarray(hidden, jnp.bfloat16)

    def loss(score):
        return jax.jit(jax.grad(lambda params, hidden: jnp.sum(score(params, hidden, tokens, Support())[0]), argnums=(0, 1)))(params, hidden)

    (ours, to_hidden), (theirs, expected) = loss(chunked.log_probs), loss(whole)
    assert ours["embedding"].dtype == jnp.float32 and to_hidden.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours["embedding"], theirs["embedding"], atol=0.03)
    np.testing.assert_allclose(np.asarray(to_hidden, np.float32), np.asarray(expected, np.float32), atol=0.05)


@pytest.mark.parametrize("differentiated", [False, True])
def test_whole_logits_never_exist(differentiated, monkeypatch):
    """No array of the program has N * T * V numbers, or more than a chunk may."""
    monkeypatch.setattr(chunked, "MOST_LOGITS", N * V * 2)
    params, hidden, tokens = case("embedding", np.float32)

    def loss(params, hidden):
        return jnp.sum(chunked.log_probs(params, hidden, tokens, Support())[0])

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)) if differentiated else loss)(params, hidden))
    assert f"[{N},2,{V}]" in text and f"[{N},{T},{V}]" not in text and f"[4,{N},2,{V}]" not in text and f"[{N},8,{V}]" not in text


def test_length_of_a_chunk():
    """Equal chunks, none with more logits than there may be, one position where even that is too many."""
    assert chunked.chunk_length(16, 64, 49152) == 32  # 42 would fit: two equal chunks
    assert chunked.chunk_length(16, 64, 2**19) == 4
    assert chunked.chunk_length(2**10, 64, 2**18) == 1
    assert chunked.chunk_length(1, 5, 7) == 5
