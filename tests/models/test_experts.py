"""Experts: against loops over tokens in NumPy, and over meshes against one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgrpo_jax import parallel
from pgrpo_jax.models import experts, grouped_matmul, quantised, transformer
from pgrpo_jax.models.config import ModelConfig
from pgrpo_jax.models.parameters import parameter_shapes

SIZES = dict(
    num_layers=2, width=8, mlp_width=6, num_heads=4, num_kv_heads=2, head_dim=4, vocab_size=24, context_length=32, rope_theta=100.0,
    norm_epsilon=1e-5, tied_embeddings=True, qk_norm=True, num_experts=4, experts_per_token=2, normalised_experts=True,
)  # fmt: skip
CASES = {
    "two of four": {},
    "shares as they are": dict(normalised_experts=False),
    "odd sizes": dict(width=7, mlp_width=5, num_experts=5, experts_per_token=3, normalised_experts=False),
    "one expert": dict(num_experts=1, experts_per_token=1),
    "every expert": dict(num_experts=3, experts_per_token=3, normalised_experts=False),
    "more experts than pairs": dict(num_experts=40, experts_per_token=1, normalised_experts=False),
}
TOKENS = (4, 5)


def gated(gate, up):
    return jax.nn.silu(gate) * up


def drawn(seed=0, **changes):
    """(sizes, the weights of one layer's experts, activations), float64."""
    config, rng = ModelConfig(**{**SIZES, **changes}), np.random.default_rng(seed)
    shapes = {name: spec.shape[1:] for name, spec in parameter_shapes(config)["layers"].items() if name in experts._AXES}
    return config, {name: rng.normal(size=shape) for name, shape in shapes.items()}, rng.normal(size=(*TOKENS, config.width))


def oracle(config, w, h):
    """A token at a time, an expert at a time."""
    out, taken = np.zeros_like(h), np.zeros(config.num_experts, int)
    for index in np.ndindex(h.shape[:-1]):
        x = h[index]
        scores = np.exp(x @ w["router"])
        probabilities = scores / scores.sum()
        best = sorted(range(config.num_experts), key=lambda e: -probabilities[e])[: config.experts_per_token]
        total = sum(probabilities[e] for e in best) if config.normalised_experts else 1.0
        for e in best:
            gate = x @ w["expert_gate"][e]
            hidden = gate / (1 + np.exp(-gate)) * (x @ w["expert_up"][e])
            out[index] += probabilities[e] / total * (hidden @ w["expert_down"][e])
            taken[e] += 1
    return out, taken


def check(config, w, h, mesh=None):
    """Values, and the slope of a sum along a random direction of every weight and of the activations; returns the gradient and tokens of each expert."""
    expected, taken = oracle(config, w, h)
    assert np.abs(expected).max() > 0.1
    pull = np.random.default_rng(9).normal(size=h.shape)

    @jax.jit
    def both(w, h):
        found, back = jax.vjp(lambda w, h: experts.mlp(config, w, h, gated, mesh), w, h)
        return found, back(pull)

    found, gradient = both(w, h)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    given, slopes = {**w, "h": h}, {**gradient[0], "h": gradient[1]}
    for name, value in given.items():
        direction = np.random.default_rng(len(name)).normal(size=value.shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = {**given, name: value + step * direction}
            out, same = oracle(config, moved, moved.pop("h"))
            assert (same == taken).all(), "no token changed its expert"
            ends.append((out * pull).sum())
        slope = np.sum(np.asarray(slopes[name]) * direction)
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-7, err_msg=name)
    return gradient[0], taken


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_oracle(case):
    with jax.enable_x64(True):
        gradient, taken = check(*drawn(**CASES[case]))
    for name in ("expert_gate", "expert_up", "expert_down"):
        touched = [bool(np.any(matrix)) for matrix in np.asarray(gradient[name])]
        assert touched == list(taken > 0), f"{name}: an expert that no token goes to has the gradient 0, exactly"


def test_all_tokens_go_to_one_expert():
    config, w, h = drawn(3, experts_per_token=1, normalised_experts=False)
    h[..., 0] = np.abs(h[..., 0]) + 1
    w["router"] = w["router"] * 0.1
    w["router"][0] = [0, 0, 3, 0]
    with jax.enable_x64(True):
        gradient, taken = check(config, w, h)
    assert taken.tolist() == [0, 0, np.prod(TOKENS), 0]
    assert np.all(np.asarray(gradient["expert_down"])[[0, 1, 3]] == 0)


def test_a_normalised_share_of_one_expert_tells_its_router_nothing():
    with jax.enable_x64(True):
        config, w, h = drawn(experts_per_token=1)
        gradient, _ = check(config, w, h)
    np.testing.assert_allclose(gradient["router"], 0, atol=1e-12)


@pytest.mark.parametrize("storage", quantised.STORAGE)
def test_stored_matrices_are_those_that_come_back(storage):
    config, w, h = drawn(5)
    w = {name: x.astype(np.float32) for name, x in w.items()}
    laid = {"expert_gate_up": np.stack([w["expert_gate"], w["expert_up"]], axis=2), "expert_down": w["expert_down"]}
    laid = {name: quantised.store(jnp.asarray(x), storage, axis=1) for name, x in laid.items()}

    def back(stored):
        if isinstance(stored, quantised.Quantised):
            return np.float64(stored.integers) * np.float64(stored.scales)[:, None]
        return np.asarray(stored, np.float64)

    gate_up = back(laid["expert_gate_up"])
    restored = {"router": w["router"], "expert_gate": gate_up[:, :, 0], "expert_up": gate_up[:, :, 1], "expert_down": back(laid["expert_down"])}
    found = experts.mlp(config, {"router": w["router"], **laid}, jnp.asarray(h, jnp.float32), gated)
    expected = oracle(config, restored, h)[0]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


# --- the matmul


def runs(sizes, behind, inputs=9, outputs=10, seed=0):
    rng = np.random.default_rng(seed)
    rows, matrices = rng.normal(size=(sum(sizes) + behind, inputs)), rng.normal(size=(len(sizes), inputs, outputs))
    return rows, matrices, np.array(sizes, np.int32)


def by_loop(rows, matrices, sizes, dy):
    """(values, gradient of rows, gradient of matrices)."""
    out, back, outer, first = [], [], np.zeros_like(matrices), 0
    for e, size in enumerate(sizes):
        for row in range(first, first + size):
            out.append(rows[row] @ matrices[e])
            back.append(matrices[e] @ dy[row])
            outer[e] += np.outer(rows[row], dy[row])
        first += size
    return np.array(out), np.array(back), outer


RUNS = [((3, 0, 20, 1), 0), ((0, 0, 0), 5), ((700,), 0), ((8, 8, 8), 8), ((0, 17, 0, 0, 40, 0), 30), ((1,) * 30, 3), ((0, 1200, 7), 100)]


@pytest.mark.parametrize("sizes, behind", RUNS)
def test_runs_are_multiplied_each_by_its_matrix(sizes, behind):
    rows, matrices, counts = runs(sizes, behind)
    dy = np.random.default_rng(1).normal(size=(len(rows), matrices.shape[2]))
    with jax.enable_x64(True):
        found, pull = jax.vjp(lambda rows, matrices: grouped_matmul.grouped_matmul(rows, matrices, counts, platform="cpu"), rows, matrices)
        back, outer = pull(jnp.asarray(dy))
    number = sum(sizes)
    expected = by_loop(rows, matrices, sizes, dy)
    assert found.shape == dy.shape
    if number:
        np.testing.assert_allclose(found[:number], expected[0], atol=1e-12)
        np.testing.assert_allclose(back[:number], expected[1], atol=1e-12)
    np.testing.assert_allclose(outer, expected[2], atol=1e-11)


@pytest.mark.parametrize("sizes, behind", [((3, 0, 150, 1), 0), ((0, 17, 0, 40), 130)])
def test_the_kernel_for_tpus_computes_the_same(sizes, behind):
    """Interpreted; with rows behind the last run, of which it promises nothing."""
    rows, matrices, counts = (x.astype(np.float32) if x.dtype == np.float64 else x for x in runs(sizes, behind))
    dy = np.random.default_rng(1).normal(size=(len(rows), matrices.shape[2])).astype(np.float32)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own kernel is not strict
        found, pull = jax.vjp(lambda rows, matrices: grouped_matmul.megablocks(rows, matrices, counts, interpret=True), rows, matrices)
        back, outer = pull(jnp.asarray(dy))
    expected = by_loop(rows, matrices, sizes, dy)
    np.testing.assert_allclose(found[: sum(sizes)], expected[0], atol=1e-5)
    np.testing.assert_allclose(back[: sum(sizes)], expected[1], atol=1e-5)
    np.testing.assert_allclose(outer, expected[2], atol=1e-4)


def test_what_lies_behind_the_last_run_reaches_nothing(monkeypatch):
    """On TPUs nobody writes there: here it is NaN, in values and gradients."""

    @jax.custom_vjp
    def spoiled(x, sizes):
        return jnp.where(jnp.arange(len(x), dtype=jnp.int32)[:, None] < jnp.sum(sizes, dtype=jnp.int32), x, jnp.nan)

    spoiled.defvjp(lambda x, sizes: (spoiled(x, sizes), sizes), lambda sizes, dy: (spoiled(dy, sizes), None))
    original = grouped_matmul.grouped_matmul
    monkeypatch.setattr(experts, "grouped_matmul", lambda rows, matrices, sizes, **rest: spoiled(original(spoiled(rows, sizes), matrices, sizes, **rest), sizes))
    with jax.enable_x64(True):
        check(*drawn(), mesh=parallel.make_mesh(jax.devices()[:2], expert=2))


# --- meshes

MESHES = {
    "data 2 x fsdp 2 x expert 2": dict(fsdp=2, expert=2),
    "expert 4 x tp 2": dict(expert=4, tp=2),
    "fsdp 2 x expert 2 x tp 2": dict(fsdp=2, expert=2, tp=2),
    "data 8": {},
}


@functools.cache
def model():
    config, rng = ModelConfig(**SIZES), np.random.default_rng(0)
    return transformer.Transformer(config, dtype=jnp.float64), jax.tree.map(lambda spec: rng.normal(size=spec.shape) * 0.5, parameter_shapes(config))


def loss(params, model, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    hidden, _ = transformer.forward(model, params, tokens, positions)
    return jnp.mean(jax.nn.log_softmax(transformer.logits(params, hidden), axis=-1)[..., 3])


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("remat", transformer.REMAT)
def test_a_mesh_computes_what_one_device_does(mesh, remat):
    if remat != "off" and mesh != "fsdp 2 x expert 2 x tp 2":
        pytest.skip("one mesh is enough")
    plain, params = model()
    tokens = np.random.default_rng(1).integers(0, 24, (8, 6)).astype(np.int32)
    over = parallel.make_mesh(jax.devices(), **MESHES[mesh])
    with jax.enable_x64(True):
        program = jax.jit(jax.value_and_grad(loss), static_argnums=1)
        expected, slope = program(params, plain, tokens)
        spread = transformer.laid_over(transformer.Transformer(plain.config, dtype=jnp.float64, remat=remat), over)
        assert spread.mesh is over
        placed = parallel.place(params, parallel.layout(params, over))
        found, gradient = program(placed, spread, parallel.shard_rows(tokens, over, axis=0))
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11 * np.abs(b).max()), gradient, slope)


def test_rows_that_do_not_divide_are_computed_everywhere():
    config, w, h = drawn(4)
    with jax.enable_x64(True):
        check(config, w, h, parallel.make_mesh(jax.devices(), fsdp=2, expert=2))  # 4 rows, over 8 devices


def test_no_device_gathers_the_experts_of_others():
    """The program of a mesh: no array in it has the matrices of all experts, or more than this device's hidden units of one."""
    plain, params = model()
    over = parallel.make_mesh(jax.devices(), expert=4, tp=2)
    with jax.enable_x64(True):
        placed = parallel.place(params, parallel.layout(params, over))
        tokens = parallel.shard_rows(np.zeros((8, 6), np.int32), over, axis=0)
        text = jax.jit(jax.grad(loss), static_argnums=1).lower(placed, transformer.laid_over(plain, over), tokens).compile().as_text()
    assert "f64[1,8,3]" in text and "f64[2,1,8,3]" in text, "a layer's, and all layers'"
    for whole in ("4,8,6", "4,8,3", "1,8,6", "2,4,8,6", "2,4,8,3", "2,1,8,6"):
        assert f"f64[{whole}]" not in text
