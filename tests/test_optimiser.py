"""The optimiser against NumPy: schedules, AdamW, and adapters that are each stepped by themselves."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import learner_cases as cases
import numpy as np
import optax
import pytest

from pgrpo_jax.models.lora import Lora
from pgrpo_jax.models.parameters import parameter_shapes, trainable_shapes
from pgrpo_jax.optimiser import learning_rate, make_optimiser, OptimiserSettings


def settings(**changes) -> OptimiserSettings:
    return dataclasses.replace(cases.OPTIMISER, **changes)


SCHEDULES = {
    "constant": [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    "linear": [0.25, 0.5, 0.75, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0],
    "cosine": [0.25, 0.5, 0.75, 1] + [0.5 + 0.5 * math.cos(math.pi * n / 8) for n in range(9)],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rate_table(schedule):
    rate = learning_rate(settings(schedule=schedule, warmup_steps=4, num_updates=12, learning_rate=2e-4))
    np.testing.assert_allclose([rate(n) for n in range(13)], 2e-4 * np.array(SCHEDULES[schedule]), rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize(
    "warmup_steps, expected", [(0, [1, 2 / 3, 1 / 3]), (1, [1, 1, 1 / 2]), (3, [1 / 3, 2 / 3, 1]), (9, [1 / 9, 2 / 9, 3 / 9])]
)
def test_warm_up_of_any_length(warmup_steps, expected):
    rate = learning_rate(settings(schedule="linear", warmup_steps=warmup_steps, num_updates=3, learning_rate=1.0))
    np.testing.assert_allclose([rate(n) for n in range(3)], expected, rtol=1e-6)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match=r"^optimiser.schedule = 'exponential' is unknown: use one of constant, cosine, linear$"):
        learning_rate(settings(schedule="exponential"))


def adamw(params, gradients, s, rates):
    """AdamW (arXiv:1711.05101, algorithm 2) after a limit on the global norm, in float64; decay on all but norms."""
    params = {name: np.float64(x) for name, x in params.items()}
    first, second = ({name: np.zeros_like(x) for name, x in params.items()} for _ in range(2))
    for t, (grads, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        norm = math.sqrt(sum(float(np.sum(np.float64(g) ** 2)) for g in grads.values()))
        factor = min(1.0, s.clip_norm / norm) if s.clip_norm else 1.0
        for name, g in grads.items():
            g = np.float64(g) * factor
            first[name] = s.b1 * first[name] + (1 - s.b1) * g
            second[name] = s.b2 * second[name] + (1 - s.b2) * g * g
            ascent = first[name] / (1 - s.b1**t) / (np.sqrt(second[name] / (1 - s.b2**t)) + s.eps)
            decay = 0.0 if "norm" in name else s.weight_decay
            params[name] = params[name] - rate * (ascent + decay * params[name])
    return params


@pytest.mark.parametrize("clip_norm, weight_decay", [(0.0, 0.0), (0.0, 0.3), (1.0, 0.3)])
def test_optimiser_equals_numpy(lenient, clip_norm, weight_decay):
    s = settings(schedule="cosine", warmup_steps=2, num_updates=8, learning_rate=0.05, clip_norm=clip_norm, weight_decay=weight_decay)
    rng = np.random.default_rng(0)
    shapes = {"embedding": (5, 3), "layers_attention_norm": (2, 3), "final_norm": (3,), "query": (2, 3, 1, 3)}
    params = {name: rng.normal(1, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    # norms on both sides of the limit: the clip is active on some steps only
    draw = lambda scale: {name: rng.normal(0, scale, shape).astype(np.float32) for name, shape in shapes.items()}  # noqa: E731
    gradients = [draw(scale) for scale in (0.5, 0.05, 2.0, 0.1, 0.02)]
    optimiser = make_optimiser(s)

    @jax.jit
    def step(state, params, grads):
        changes, state = optimiser.update(grads, state, params)
        return state, optax.apply_updates(params, changes)

    found, state = params, optimiser.init(params)
    for grads in gradients:
        state, found = step(state, found, grads)
    expected = adamw(params, gradients, s, [float(learning_rate(s)(n)) for n in range(len(gradients))])
    for name in params:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, err_msg=name)


def test_weight_decay_leaves_every_norm_and_bias_of_the_model_alone(lenient):
    """With gradient 0 only the decay moves parameters."""
    config = dataclasses.replace(cases.CONFIG, qkv_bias=True, qk_norm=True, post_norms=True)
    params = jax.tree.map(lambda spec: np.full(spec.shape, 0.5, np.float32), parameter_shapes(config))
    optimiser = make_optimiser(settings(weight_decay=0.1, learning_rate=0.5))
    changes, _ = jax.jit(optimiser.update)(jax.tree.map(jnp.zeros_like, params), optimiser.init(params), params)
    decayed = {jax.tree_util.keystr(path) for path, x in jax.tree_util.tree_leaves_with_path(changes) if np.any(x)}
    assert decayed == {"['embedding']"} | {f"['layers']['{name}']" for name in ("query", "key", "value", "output", "gate", "up", "down")}
    np.testing.assert_allclose(changes["embedding"], -0.05 * params["embedding"], rtol=1e-5)


# --- adapters


ADAPTED = dataclasses.replace(cases.CONFIG, lora=Lora(rank=2, alpha=4.0, targets=("query", "down"), num_adapters=3))


def drawn(rng, scale):
    return jax.tree.map(lambda spec: rng.normal(0, scale, spec.shape).astype(np.float32), trainable_shapes(ADAPTED))


def flat(tree, adapter):
    return {name: np.asarray(x)[:, adapter] for name, x in tree["layers"].items()}


@pytest.mark.parametrize("clip_norm, weight_decay", [(0.0, 0.0), (1.0, 0.3)])
def test_each_adapter_is_stepped_as_if_it_were_alone(lenient, clip_norm, weight_decay):
    """Adapter k takes part in some of the updates: AdamW of those alone, at the rates of the run's updates, its norm limited by itself."""
    s = settings(schedule="linear", warmup_steps=2, num_updates=8, learning_rate=0.05, clip_norm=clip_norm, weight_decay=weight_decay, num_adapters=3)
    rng = np.random.default_rng(3)
    params, present = drawn(rng, 1.0), np.array([[1, 0, 1], [1, 1, 0], [0, 0, 1], [1, 0, 1], [0, 1, 1]], bool)
    gradients = [drawn(rng, scale) for scale in (0.5, 0.05, 2.0, 0.1, 0.02)]
    optimiser = make_optimiser(s)

    @jax.jit
    def step(state, params, grads, present):
        changes, state = optimiser.update(grads, state, params, present=present)
        return state, optax.apply_updates(params, changes)

    found, state = params, optimiser.init(params)
    for grads, there in zip(gradients, present, strict=True):
        before = jax.device_get((found, state))
        state, found = step(state, found, grads, there)
        for k in np.flatnonzero(~there):
            for name, x in flat(before[0], k).items():
                np.testing.assert_array_equal(flat(found, k)[name], x, err_msg=f"{name} of absent adapter {k}")
    rates = [float(learning_rate(s)(n)) for n in range(len(gradients))]
    for k in range(3):
        mine = np.flatnonzero(present[:, k])
        expected = adamw(flat(params, k), [flat(gradients[i], k) for i in mine], s, [rates[i] for i in mine])
        for name, x in expected.items():
            np.testing.assert_allclose(flat(found, k)[name], x, rtol=2e-5, atol=1e-6, err_msg=f"{name} of adapter {k}")


def test_a_lone_adapter_is_stepped_as_parameters_are(lenient):
    """K = 1: the same as without the axis of adapters."""
    alone = dataclasses.replace(cases.CONFIG, lora=dataclasses.replace(ADAPTED.lora, num_adapters=1))
    rng, s = np.random.default_rng(4), settings(warmup_steps=0, weight_decay=0.2, clip_norm=0.5)
    params, gradient = [jax.tree.map(lambda spec: rng.normal(size=spec.shape).astype(np.float32), trainable_shapes(alone)) for _ in range(2)]
    made = []
    for optimiser in (make_optimiser(s), make_optimiser(dataclasses.replace(s, num_adapters=1))):
        state, moved = optimiser.init(params), params
        for _ in range(3):
            changes, state = jax.jit(optimiser.update)(gradient, state, moved)
            moved = optax.apply_updates(moved, changes)
        made.append(moved)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), *made)
