"""The network: against SmolLM2's reference logits, and against a Llama written again in NumPy, float64, one token at a time."""

import functools
import pathlib

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from pgrpo_jax.models import attention, layers, transformer, weights
from pgrpo_jax.models.config import ModelConfig
from pgrpo_jax.models.parameters import parameter_shapes

MODEL = pathlib.Path(".assets/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf")
REFERENCE = pathlib.Path(__file__).parents[1] / "data" / "smollm2_reference.npz"
TINY = dict(
    num_layers=2, width=16, mlp_width=24, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=23, context_length=64, rope_theta=100.0,
    norm_epsilon=1e-5, tied_embeddings=True,
)  # fmt: skip
SHAPES = {
    "two query heads for each key head": {},
    "one key head": dict(num_kv_heads=1),
    "as many key heads": dict(num_kv_heads=4),
    "odd sizes, untied": dict(
        num_layers=3, width=15, mlp_width=7, num_heads=9, num_kv_heads=3, head_dim=2, vocab_size=13, tied_embeddings=False
    ),
    "one of everything": dict(num_layers=1, width=1, mlp_width=1, num_heads=1, num_kv_heads=1, head_dim=2, vocab_size=2),
}  # fmt: skip


def build(seed=0, *, dtype=jnp.float32, **changes):
    """A tiny model and random parameters; norm scales are random too, so that none can be forgotten."""
    config = ModelConfig(**{**TINY, **changes})
    rng = np.random.default_rng(seed)

    def draw(path, spec):
        if "norm" in jax.tree_util.keystr(path):
            return rng.uniform(0.5, 1.5, spec.shape).astype(np.float32)
        return rng.normal(0, 0.3, spec.shape).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, parameter_shapes(config))
    return transformer.Transformer(config, dtype=dtype), params


def llama_logits(config, params, tokens):
    """The Llama forward in float64 by loops over tokens and heads: [T] ids -> [T, V]."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean() + config.norm_epsilon) * scale

    def turn(x, position):
        half = config.head_dim // 2
        out = np.empty_like(x)
        for i in range(half):
            angle = position * config.rope_theta ** (-i / half)
            out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
            out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
        return out

    stream = [p["embedding"][token] for token in tokens]
    for layer in range(config.num_layers):
        w = {name: array[layer] for name, array in p["layers"].items()}
        keys, values, after = [], [], []
        for position, x in enumerate(stream):
            h = norm(x, w["attention_norm"])
            keys.append([turn(h @ w["key"][:, j], position) for j in range(config.num_kv_heads)])
            values.append([h @ w["value"][:, j] for j in range(config.num_kv_heads)])
            for head in range(config.num_heads):
                shared = head // (config.num_heads // config.num_kv_heads)
                q = turn(h @ w["query"][:, head], position)
                scores = np.exp(np.array([q @ k[shared] for k in keys]) / np.sqrt(config.head_dim))
                x = x + sum(s * v[shared] for s, v in zip(scores / scores.sum(), values)) @ w["output"][head]
            h = norm(x, w["mlp_norm"])
            gate = h @ w["gate"]
            after.append(x + (gate / (1 + np.exp(-gate)) * (h @ w["up"])) @ w["down"])
        stream = after
    head = p["embedding"].T if config.tied_embeddings else p["head"]
    return np.array([norm(x, p["final_norm"]) @ head for x in stream])


@functools.partial(jax.jit, static_argnums=0)
def uncached(model, params, tokens):
    """[B, T] -> logits [B, T, V] of one forward pass without context."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
    return transformer.logits(params, transformer.forward(model, params, tokens.astype(jnp.int32), positions)[0])


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, tokens, positions, context):
    """(logits [B, T, V], keys and values) of tokens against a context."""
    hidden, key_values = transformer.forward(model, params, tokens, positions, context)
    return transformer.logits(params, hidden), key_values


def test_smollm2_logits_equal_the_reference():
    if not MODEL.is_file():
        pytest.fail(f"{MODEL} is missing: run launch/test.sh, which fetches it")
    config, params = weights.load(MODEL)
    model, reference = transformer.Transformer(config), np.load(REFERENCE)
    tokens = np.zeros((3, 44), np.int32)
    for k in range(3):
        ids = reference[f"ids{k}"]
        tokens[k, : len(ids)] = ids
    ours = np.asarray(uncached(model, params, tokens))
    for k in range(3):
        length = len(reference[f"ids{k}"])
        np.testing.assert_allclose(ours[k, :length][:, reference["columns"]], reference[f"logits{k}"], atol=2e-3, rtol=0)
        sums = np.log(np.exp(ours[k, :length].astype(np.float64)).sum(axis=-1))
        np.testing.assert_allclose(sums, reference[f"logsumexp{k}"], atol=2e-3, rtol=0)  # the columns that are not compared


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_the_oracle(shape):
    tokens = np.random.default_rng(1).integers(0, SHAPES[shape].get("vocab_size", 23), (2, 9))
    model, params = build(**SHAPES[shape])
    expected = np.stack([llama_logits(model.config, params, row) for row in tokens])
    assert expected.std() > 0.01
    np.testing.assert_allclose(uncached(model, params, tokens), expected, atol=1e-4)
    with jax.enable_x64(True):
        wide = transformer.Transformer(model.config, dtype=jnp.float64)
        ours = uncached(wide, jax.tree.map(np.float64, params), tokens)
        assert ours.dtype == jnp.float64
        np.testing.assert_allclose(ours, expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("shape", list(SHAPES)[1:4])
def test_bfloat16_stays_within_its_rounding(shape):
    tokens = np.random.default_rng(1).integers(0, SHAPES[shape].get("vocab_size", 23), (2, 9))
    model, params = build(dtype=jnp.bfloat16, **SHAPES[shape])
    expected = np.stack([llama_logits(model.config, params, row) for row in tokens])
    ours = uncached(model, params, tokens)
    assert ours.dtype == jnp.float32
    # each layer rounds about ten times on the way to the logits, by up to 2**-9 of the number each
    errors = np.abs(np.asarray(ours) - expected) / np.abs(expected).max()
    layers = model.config.num_layers
    assert np.sqrt((errors**2).mean()) <= 2**-9 * np.sqrt(10 * layers) and errors.max() <= 2**-9 * 10 * layers


def test_bfloat16_logits_and_scores_are_summed_in_float32():
    rng = np.random.default_rng(2)
    hidden, head = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((1, 4, 64), (64, 11)))
    exact = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    for params in ({"embedding": head.T}, {"embedding": head.T * 0, "head": head}):
        np.testing.assert_allclose(transformer.logits(params, hidden), exact, rtol=1e-4, atol=1e-5)
    # scores of about 45 that differ by 0.3: bfloat16 is spaced by 0.25 there
    normal = [rng.standard_normal((1, size, 1, 64)) for size in (3, 5, 5)]
    query, keys, values = (jnp.asarray(x, jnp.bfloat16) for x in (2 + np.abs(normal[0]), 2 + 0.1 * normal[1], normal[2]))
    out = attention.attend(query, [(keys.transpose(0, 2, 3, 1), values.swapaxes(1, 2), jnp.ones((1, 1, 5), bool))])
    scores = np.einsum("bthd,bshd->ts", np.asarray(query, np.float64), np.asarray(keys, np.float64)) / 8
    weights_ = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights_ /= weights_.sum(axis=1, keepdims=True)
    expected = weights_ @ np.asarray(values, np.float64)[0, :, 0]
    np.testing.assert_allclose(np.asarray(out, np.float64)[0, :, 0], expected, atol=0.015)


def test_rotation_depends_on_the_distance_only_and_keeps_lengths():
    rng = np.random.default_rng(3)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 6)), jnp.float32) for _ in range(2))
    config = ModelConfig(**{**TINY, "head_dim": 6, "rope_theta": 100.0})

    def turned(x, position):
        angles = layers.rotation(jnp.full((1, 1), position, jnp.int32), config, jnp.float32)
        return np.asarray(layers.rotate(x, angles))[0, 0, 0]

    np.testing.assert_array_equal(turned(q, 0), q[0, 0, 0])
    np.testing.assert_allclose(turned(q, 7) @ turned(k, 3), turned(q, 24) @ turned(k, 20), rtol=1e-4)
    assert abs(turned(q, 7) @ turned(k, 3) - turned(q, 3) @ turned(k, 7)) > 1e-2
    np.testing.assert_allclose(np.linalg.norm(turned(q, 1000)), np.linalg.norm(q), rtol=1e-5)


def test_attention_over_parts_is_one_softmax_over_their_union():
    """Parts of 2 and 6 rows under a batch of 6, each with its own mask, once for each row of the batch; some rows masked altogether."""
    rng = np.random.default_rng(4)
    batch, length, heads, kv_heads, size = 6, 2, 6, 3, 4
    query = rng.standard_normal((batch, length, heads, size))
    shapes = [(2, 5), (6, 3), (2, 4), (6, 2)]
    parts = [(rng.standard_normal((b, s, kv_heads, size)), rng.standard_normal((b, s, kv_heads, size))) for b, s in shapes]
    masks = [rng.random((2, 1, 5)) < 0.6, rng.random((6, 1, 3)) < 0.6, rng.random((6, 1, 4)) < 0.6, np.tril(np.ones((2, 2), bool))[None]]
    masks[0][0], masks[1][1], masks[2][4] = False, False, False
    out = attention.attend(
        jnp.asarray(query, jnp.float32),
        [
            (jnp.asarray(k.transpose(0, 2, 3, 1), jnp.float32), jnp.asarray(v.swapaxes(1, 2), jnp.float32), jnp.asarray(m))
            for (k, v), m in zip(parts, masks)
        ],
    )
    for b in range(batch):
        for t in range(length):
            for h in range(heads):
                scored = []
                for (keys, values), mask in zip(parts, masks):
                    row, allowed = b // (batch // len(keys)), np.broadcast_to(mask[:, 0] if mask.shape[1] == 1 else mask[:, t], (len(mask), keys.shape[1]))
                    for s in np.flatnonzero(allowed[b * len(mask) // batch]):
                        scored.append((np.exp(query[b, t, h] @ keys[row, s, h // 2] / 2.0), values[row, s, h // 2]))
                expected = sum(w * v for w, v in scored) / sum(w for w, _ in scored)
                np.testing.assert_allclose(out[b, t, h], expected, atol=1e-5)


@pytest.mark.parametrize("window, sequences", [(None, None), (4, None), (4, [0] * 5 + [1] * 6)])
def test_attention_over_a_part_and_the_tokens_themselves(window, sequences):
    """Token by token: what a window, a mask, another sequence and causality leave, capped scores, a scale of its own."""
    rng = np.random.default_rng(9)
    query, keys, values = [rng.standard_normal(shape).astype(np.float32) for shape in ((2, 11, 2, 2), (2, 1, 2, 11), (2, 1, 11, 2))]
    prompt_keys, prompt_values = [rng.standard_normal(shape).astype(np.float32) for shape in ((1, 1, 2, 3), (1, 1, 3, 2))]
    mask, at = np.array([True, False, True]), 3 + np.arange(11) - (5 * np.asarray(sequences) if sequences else 0)
    config = ModelConfig(**{**TINY, "num_heads": 2, "num_kv_heads": 1, "head_dim": 2, "score_soft_cap": 3.0, "query_scalar": 5.0})
    part = tuple(map(jnp.asarray, (prompt_keys, prompt_values, mask[None, None], np.arange(3, dtype=np.int32)[None])))
    both = None if sequences is None else jnp.asarray(np.array([sequences] * 2, np.int32))
    attends = attention.attention_over(config, [part], jnp.asarray(np.stack([at] * 2), jnp.int32), window=window, sequences=both)
    out, kept = attends(*map(jnp.asarray, (query, keys, values)))
    assert kept[0].shape == keys.shape
    for b, t, head in np.ndindex(2, 11, 2):
        scored = [(prompt_keys[0, 0, :, s], prompt_values[0, 0, s]) for s in range(3) if mask[s] and (window is None or at[t] - s < window)]
        for s in range(t + 1):
            if (sequences is None or sequences[s] == sequences[t]) and (window is None or at[t] - at[s] < window):
                scored.append((keys[b, 0, :, s], values[b, 0, s]))
        weights_ = [np.exp(3 * np.tanh(query[b, t, head] @ key / np.sqrt(5) / 3)) for key, _ in scored]
        expected = sum(w * value for w, (_, value) in zip(weights_, scored)) / sum(weights_)
        np.testing.assert_allclose(out[b, t, head], expected, atol=1e-5)


@pytest.mark.parametrize("completions_per_prompt", [1, 3])
def test_tokens_run_against_context_equal_one_uncached_pass(completions_per_prompt):
    """Prompts of 1, 4 and 6 tokens padded to 6 with rubbish, then chunks of 2, 1 and 3 tokens that attend to it and to each other."""
    model, params = build(5)
    rng = np.random.default_rng(5)
    lengths = np.array([1, 4, 6], np.int32)
    prompts, rest = (rng.integers(0, 23, shape).astype(np.int32) for shape in ((3, 6), (3 * completions_per_prompt, 5)))
    context = [jax.jit(transformer.prefill, static_argnums=0)(model, params, prompts, lengths)]
    owner = np.repeat(np.arange(3), completions_per_prompt)
    last = np.asarray(transformer.last_tokens(prompts, lengths))
    np.testing.assert_array_equal(last, [prompts[0, 0], prompts[1, 3], prompts[2, 5]])
    inputs = np.concatenate([last[owner, None], rest], axis=1)
    ours, start = [], 0
    for size in (2, 1, 3):
        positions = (lengths[owner, None] - 1 + np.arange(start, start + size)).astype(np.int32)
        logits, new = run(model, params, inputs[:, start : start + size], positions, context)
        context.append(transformer.Segment(key_values=new, mask=np.ones((len(rest), size), bool), positions=positions))
        ours.append(logits)
        start += size
    ours = np.concatenate(ours, axis=1)
    for row, p in enumerate(owner):
        whole = np.concatenate([prompts[p, : lengths[p]], rest[row], np.zeros(6 - lengths[p], np.int32)])
        expected = np.asarray(uncached(model, params, whole[None]))[0, lengths[p] - 1 :][:6]
        np.testing.assert_allclose(ours[row], expected, atol=1e-5)


def test_padding_on_the_right_and_later_tokens_change_nothing():
    model, params = build(6)
    tokens = np.random.default_rng(6).integers(0, 23, (1, 8))
    other = tokens.copy()
    other[0, 5:] = (other[0, 5:] + 1) % 23
    first, second = np.asarray(uncached(model, params, tokens)), np.asarray(uncached(model, params, other))
    np.testing.assert_array_equal(first[0, :5], second[0, :5])
    assert np.abs(first - second)[0, 5:].max() > 1e-2


def scans(jaxpr):
    """Every scan of a program, inner ones too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from scans(inner)


def test_remat_keeps_less_and_gives_the_same_gradient():
    plain, params = build(7)
    tokens = np.random.default_rng(7).integers(0, 23, (2, 8))

    def loss(params, model):
        return jnp.sum(jax.nn.log_softmax(uncached(model, params, tokens))[..., 3])

    gradient = jax.grad(loss)
    models = {name: transformer.Transformer(plain.config, remat=name) for name in transformer.REMAT}
    found = {name: jax.jit(gradient, static_argnums=1)(params, model) for name, model in models.items()}
    kept, matmuls = {}, {}
    for name, model in models.items():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max()), found[name], found["off"])
        forward, backward = scans(jax.make_jaxpr(gradient, static_argnums=1)(params, model).jaxpr)
        kept[name] = sum(var.aval.size for var in forward.outvars)
        matmuls[name] = str(backward.params["jaxpr"]).count("dot_general")
    # a layer's input (B * T * D) for each layer and the keys and values that the forward pass returns anyway
    assert kept["keep_nothing"] < kept["off"] / 3
    assert kept["keep_nothing"] < kept["keep_matmuls"] < kept["off"] / 1.5
    # 18 of the backward pass; again the scores and what they attend to; again queries, keys, values, output, gate and up
    assert matmuls == {"off": 18, "keep_matmuls": 20, "keep_nothing": 26}


def test_experts_are_drawn_each_by_its_own_fan_in():
    config = ModelConfig(**{**TINY, "width": 64, "mlp_width": 128, "num_experts": 5, "experts_per_token": 2})
    drawn = transformer.initialise(transformer.Transformer(config), jax.random.key(8))["layers"]
    for name, size in {"router": 64, "expert_gate": 64, "expert_up": 64, "expert_down": 128}.items():
        np.testing.assert_allclose(np.std(drawn[name]), size**-0.5, rtol=0.1)


def test_initialisation_has_the_documented_tree_and_scale():
    config = ModelConfig(**{**TINY, "width": 64, "mlp_width": 128, "vocab_size": 301, "tied_embeddings": False})
    params = transformer.initialise(transformer.Transformer(config), jax.random.key(8))
    shapes = parameter_shapes(config)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda s: (s.shape, s.dtype), shapes)
    fan_in = {"embedding": 64, "head": 64, "query": 64, "key": 64, "value": 64, "output": 32, "gate": 64, "up": 64, "down": 128}
    flat = {**params, **params["layers"]}
    for name, size in fan_in.items():
        np.testing.assert_allclose(np.std(flat[name]), size**-0.5, rtol=0.05)
    layers = np.asarray(params["layers"]["query"])
    assert abs(np.corrcoef(layers[0].ravel(), layers[1].ravel())[0, 1]) < 0.1  # layers are drawn apart
    assert all(np.all(np.asarray(flat[name]) == 1) for name in ("final_norm", "attention_norm", "mlp_norm"))
