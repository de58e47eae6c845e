"""Adapters against the matrices they stand for: merged, by row, where they are cut, and what they start from."""

import dataclasses

import jax
import jax.numpy as jnp
import learner_cases as cases
import numpy as np
import pytest

from pgrpo_jax import parallel
from pgrpo_jax.generation.engine import generate, GenerationSettings
from pgrpo_jax.generation.sampler import Support
from pgrpo_jax.generation.scoring import score
from pgrpo_jax.models import lora, transformer
from pgrpo_jax.models.lora import Lora
from pgrpo_jax.models.parameters import parameter_shapes, SHARDED_AXES, trainable_shapes

ALL = tuple(lora.TARGETS)


def adapted(num_adapters=1, targets=ALL, config=cases.CONFIG) -> transformer.Transformer:
    return transformer.Transformer(dataclasses.replace(config, lora=Lora(rank=3, alpha=5.0, targets=targets, num_adapters=num_adapters)))


def params_of(model, name="adapted", dtype=np.float32):
    return cases.params(name, dtype, model.config)


def by_hand(params, adapter):
    """W + alpha / r · A·B, layer by layer in float64, as a tree without adapters."""
    layers = {name: np.array(x, np.float64) for name, x in params["layers"].items()}
    for target, split in lora.TARGETS.items():
        if f"{target}_lora_a" not in layers:
            continue
        a, b = layers.pop(f"{target}_lora_a"), layers.pop(f"{target}_lora_b")
        w = layers[target]
        for layer in range(len(w)):
            rows = a[layer, adapter].reshape(-1, 3)
            columns = b[layer, adapter].reshape(3, -1)
            w[layer] += 5 / 3 * (rows @ columns).reshape(w.shape[1:])
        assert split in (1, 2)
    return {**{name: np.asarray(x, np.float64) for name, x in params.items() if name != "layers"}, "layers": layers}


def as_float32(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


TOKENS = np.arange(12, dtype=np.int32).reshape(3, 4) * 5 % cases.V
POSITIONS = np.broadcast_to(np.arange(4, dtype=np.int32), (3, 4))


def logits(model, params, adapters=None):
    run = jax.jit(lambda p: transformer.logits(p, transformer.forward(model, p, TOKENS, POSITIONS, adapters=adapters)[0]))
    return np.asarray(run(params))


@pytest.mark.parametrize("targets", [ALL, ("query",), ("output", "down")])
def test_a_model_with_an_adapter_computes_what_the_merged_one_does(targets):
    model = adapted(targets=targets)
    params = params_of(model)
    found, bare = logits(model, params), cases.MODEL
    expected = logits(bare, as_float32(by_hand(params, 0)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert np.abs(found - logits(bare, {**params, "layers": {n: x for n, x in params["layers"].items() if "lora" not in n}})).max() > 0.1


@pytest.mark.parametrize("numpy", [True, False])
def test_merging_equals_the_products_by_hand(numpy):
    model = adapted(num_adapters=3)
    params = params_of(model)
    given = jax.tree.map(np.asarray, params) if numpy else params
    for adapter in range(3):
        found, expected = lora.merged(model.config.lora, given, adapter), by_hand(params, adapter)
        assert jax.tree.structure(found) == jax.tree.structure(parameter_shapes(cases.CONFIG))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    with pytest.raises(ValueError, match=r"^adapter 3 is outside \[0, 3\): name one of the model's adapters$"):
        lora.merged(model.config.lora, params, 3)


def test_each_row_is_answered_by_its_own_adapter():
    model, rows = adapted(num_adapters=3), np.array([2, 0, 2], np.int32)
    params = params_of(model)
    found = logits(model, params, rows)
    for row, adapter in enumerate(rows):
        expected = logits(cases.MODEL, as_float32(by_hand(params, adapter)))[row]
        np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max(), err_msg=f"row {row}")
    with pytest.raises(ValueError, match=r"^the model has 3 adapters, one must be named for each row"):
        logits(model, params)


def test_scores_and_their_gradients_are_those_of_merged_models():
    """Prompts of all preference groups in one batch against one model a preference group; gradients by the chain rule, in float64."""
    with jax.enable_x64(True):
        model = dataclasses.replace(adapted(num_adapters=3, targets=("query", "output", "up")), dtype=jnp.float64)
        params, batch = params_of(model, dtype=np.float64), cases.batch("batch", np.float64)
        bare = dataclasses.replace(cases.MODEL, dtype=jnp.float64)
        counted = (batch.completion_mask & batch.valid[:, None]).astype(np.float64)

        def total(model, params, mask):
            return jnp.sum(score(model, params, batch, Support())[0] * mask)

        graded = jax.jit(jax.value_and_grad(total, argnums=1), static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
        value, gradient = graded(model, params, counted)
        of_all, ids = 0.0, np.asarray(batch.preference_ids)[np.asarray(batch.prompt_index)]
        for k in range(3):
            mask = counted * (ids == k)[:, None]
            merged = by_hand(params, k)
            part, to_merged = graded(bare, merged, mask)
            of_all += part
            for target in ("query", "output", "up"):
                a, b = params["layers"][f"{target}_lora_a"][:, k], params["layers"][f"{target}_lora_b"][:, k]
                dw = np.asarray(to_merged["layers"][target]).reshape(len(a), -1, b[0, 0].size)
                a, b = np.asarray(a).reshape(len(a), -1, 3), np.asarray(b).reshape(len(b), 3, -1)
                expected = {"a": 5 / 3 * dw @ b.swapaxes(1, 2), "b": 5 / 3 * a.swapaxes(1, 2) @ dw}
                for letter, x in expected.items():
                    found = np.asarray(gradient["layers"][f"{target}_lora_{letter}"])[:, k]
                    np.testing.assert_allclose(found.reshape(x.shape), x, rtol=1e-8, atol=1e-10, err_msg=f"{target} {letter} {k}")
        np.testing.assert_allclose(value, of_all, rtol=1e-10)


def test_an_adapter_that_no_row_uses_has_no_gradient():
    model = adapted(num_adapters=3)
    batch = cases.batch("batch")
    batch = batch.replace(preference_ids=np.where(batch.preference_ids == 1, 2, batch.preference_ids))
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(score(model, p, batch, Support())[0])))(params_of(model))
    for name, x in gradient["layers"].items():
        if lora.is_adapter(name):
            assert not np.any(x[:, 1]), name
            assert np.any(x[:, 0]) and np.any(x[:, 2]), name


@pytest.mark.parametrize("storage, slots", [("model", 0), ("model", 4), ("int8", 0)])
def test_generation_answers_each_prompt_with_its_adapter(storage, slots):
    """Against one model a preference group, merged; with int8 against the same engine on one preference group's prompts."""
    model = adapted(num_adapters=3)
    params, adapters = params_of(model), np.array([2, 0, 1, 2], np.int32)
    prompts = np.tile(np.arange(1, 41, dtype=np.int32) % cases.V, (4, 1))  # all begin alike, in 39 tokens: nothing of it may be shared
    prompts[:, -1] = [3, 5, 7, 3]
    lengths = np.full(4, 40, np.int32)
    config = dataclasses.replace(model.config, context_length=64)
    what = GenerationSettings(
        max_new_tokens=12, support=Support(top_k=1), stop_ids=(), pad_id=cases.PAD, prompt_buckets=(40,), slots=slots, weights=storage, smallest_batch=1
    )

    def answers(config, params, rows, adapters):
        made = generate(
            transformer.Transformer(config), params, prompts[rows], lengths[rows], jax.random.key(0), completions_per_prompt=2, settings=what, adapters=adapters
        )
        return made.tokens.reshape(len(rows), 2, -1), made.log_probs.reshape(len(rows), 2, -1)

    found = answers(config, params, np.arange(4), adapters)
    for k in range(3):
        rows = np.flatnonzero(adapters == k)
        merged = storage == "model"
        of_one = dataclasses.replace(config, lora=None) if merged else config
        expected = answers(of_one, as_float32(by_hand(params, k)) if merged else params, rows, None if merged else adapters[rows])
        np.testing.assert_array_equal(found[0][rows], expected[0], err_msg=f"adapter {k}")
        np.testing.assert_allclose(found[1][rows], expected[1], atol=1e-4)
    assert len({row.tobytes() for row in found[0][:, 0]}) >= 3, "the adapters differ"
    with pytest.raises(ValueError, match=r"^adapters \[2, 0, 1, 3\] must be one for each of 4 prompts, in \[0, 3\): the model has 3$"):
        answers(config, params, np.arange(4), np.array([2, 0, 1, 3]))


def test_adapters_begin_alike_and_change_nothing():
    model = adapted(num_adapters=3)
    trained = lora.initial(model.config.lora, trainable_shapes(model.config), jax.random.key(1))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), trained) == jax.tree.map(lambda x: (x.shape, x.dtype), trainable_shapes(model.config))
    for name, x in trained["layers"].items():
        assert np.all(x == x[:, :1]), name
        assert np.any(x) == name.endswith("_a")
    fan_in = cases.CONFIG.width
    np.testing.assert_allclose(np.std(trained["layers"]["gate_lora_a"][:, 0]) * fan_in**0.5, 1, atol=0.25)
    base = cases.params("policy")
    whole = lora.joined(base, trained)
    rows = np.array([0, 1, 2], np.int32)
    np.testing.assert_array_equal(logits(model, whole, rows), logits(cases.MODEL, base))
    assert jax.tree.structure(whole) == jax.tree.structure(parameter_shapes(model.config))
    assert jax.tree.structure(lora.trainable(model.config.lora, whole)) == jax.tree.structure(trained)


def test_adapters_are_cut_as_their_matrices_are():
    assert SHARDED_AXES["query_lora_a"] == (None, None, "fsdp", None)  # [L, K, D, r]
    assert SHARDED_AXES["query_lora_b"] == (None, None, None, "tp", None)  # [L, K, r, H, Dh]
    assert SHARDED_AXES["output_lora_a"] == (None, None, "tp", None, None)  # [L, K, H, Dh, r]
    assert SHARDED_AXES["output_lora_b"] == (None, None, None, "fsdp")  # [L, K, r, D]
    shapes = parameter_shapes(adapted().config)["layers"]
    for name in shapes:
        assert len(SHARDED_AXES[name]) == shapes[name].ndim, name


def test_a_sharded_model_with_adapters_computes_the_same():
    model, rows = adapted(num_adapters=3), np.array([2, 0, 2], np.int32)
    params = params_of(model)
    placed = parallel.place(params, parallel.layout(params, parallel.make_mesh(jax.devices(), fsdp=4, tp=2)))
    expected = logits(model, params, rows)
    np.testing.assert_allclose(logits(model, placed, rows), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_published_sizes():
    """SmolLM2-135M with rank 8 on all matrices: under 2 % of the model's bytes are sent."""
    config = dataclasses.replace(
        cases.CONFIG, num_layers=30, width=576, mlp_width=1536, num_heads=9, num_kv_heads=3, head_dim=64, vocab_size=49152,
        lora=Lora(rank=8, alpha=16.0, targets=ALL),
    )  # fmt: skip
    sent, whole = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (trainable_shapes(config), parameter_shapes(dataclasses.replace(config, lora=None)))]
    assert (sent, whole) == (2_442_240, 134_515_008)
    assert sent / whole < 0.02


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rank": 0}, "lora has rank 0 and 1 adapters, both must be at least 1"),
        ({"num_adapters": 0}, "lora has rank 2 and 0 adapters"),
        ({"alpha": 0.0}, "lora's alpha is 0.0, must be finite and above 0"),
        ({"targets": ()}, "lora's targets are '', must be some of query key value output gate up down, each once"),
        ({"targets": ("query", "embedding")}, "lora's targets are 'query embedding', must be"),
        ({"targets": ("up", "up")}, "lora's targets are 'up up', must be"),
    ],
)
def test_adapters_that_can_not_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Lora(**{"rank": 2, "alpha": 4.0, "targets": ("query",), "num_adapters": 1} | changes)


def test_experts_have_no_adapters():
    sizes = dataclasses.replace(cases.CONFIG, num_experts=4, experts_per_token=2)
    with pytest.raises(ValueError, match="^lora's targets are 'query up down', experts have no adapters: leave out down, up$"):
        dataclasses.replace(sizes, lora=Lora(rank=2, alpha=4.0, targets=("query", "up", "down")))
    beside = dataclasses.replace(sizes, lora=Lora(rank=2, alpha=4.0, targets=("query", "output")))
    assert {name for name in parameter_shapes(beside)["layers"] if lora.is_adapter(name)} == {f"{name}_lora_{x}" for name in ("query", "output") for x in "ab"}
