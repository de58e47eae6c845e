"""The policy before training, wherever its parameters come from and go to: the same numbers on the host and on devices."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import learner_cases as cases
import numpy as np
import pytest

from pgrpo_jax import parallel
from pgrpo_jax.base_policy import Base
from pgrpo_jax.models import hugging_face, lora, safetensors_weights, transformer, weights
from pgrpo_jax.models.lora import Lora
from pgrpo_jax.models.parameters import frozen_shapes, parameter_shapes, trainable_shapes
from pgrpo_jax.models.tokenizer import ByteTokenizer
from tests.models.test_weights import TINY, tiny_tensors, write_tiny

MESHES = [(8, 1), (4, 2)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A Hugging Face directory of `cases.CONFIG` with the parameters "policy", in bfloat16."""
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(hugging_face.from_model_config(cases.CONFIG)))
    safetensors_weights.save(path, cases.CONFIG, jax.device_get(cases.params("policy")), dtype="bfloat16")
    return path


def base(path, *, adapters=None, dtype=np.float32, config=cases.CONFIG) -> Base:
    model = transformer.Transformer(dataclasses.replace(config, lora=adapters), dtype=jnp.dtype(dtype))
    return Base(model=model, tokenizer=ByteTokenizer(), path=str(path), seed=3, sha256="")


def layouts(config, fsdp, tp):
    mesh = parallel.make_mesh(jax.devices(), fsdp=fsdp, tp=tp)
    return [parallel.layout(shapes(config), mesh) for shapes in (trainable_shapes, frozen_shapes)]


def equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True), a, b)


@pytest.mark.parametrize("fsdp, tp", MESHES)
def test_all_of_a_directory_lies_as_it_is_asked_for(directory, fsdp, tp):
    made = base(directory)
    shardings, none = layouts(made.model.config, fsdp, tp)
    found = made.trainable(shardings)
    rounded = jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32)), cases.params("policy"))
    equal(found, rounded)
    equal(made.trainable(), rounded)
    assert jax.tree.map(lambda x: x.sharding, found) == shardings
    assert made.frozen(none) == made.frozen() == {}


@pytest.mark.parametrize("fsdp, tp", MESHES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_adapters_are_added_to_is_held_as_it_is_computed_with(directory, fsdp, tp, dtype):
    adapters = Lora(rank=2, alpha=4.0, targets=("query", "down"), num_adapters=3)
    made = base(directory, adapters=adapters, dtype=dtype)
    trainable, frozen = layouts(made.model.config, fsdp, tp)
    held = made.frozen(frozen)
    assert jax.tree.structure(held) == jax.tree.structure(parameter_shapes(cases.CONFIG))
    for path, x in jax.tree_util.tree_leaves_with_path(held):
        assert x.dtype == (np.float32 if "norm" in path[-1].key else jnp.dtype(dtype)), path
    equal(held, made.frozen())
    equal(jax.tree.map(lambda x: x.astype(jnp.float32), held), weights.load(directory)[1])  # they were written in bfloat16
    assert jax.tree.map(lambda x: x.sharding, held) == frozen
    equal(made.trainable(trainable), made.trainable())
    assert jax.tree.structure(lora.joined(held, made.trainable(trainable))) == jax.tree.structure(parameter_shapes(made.model.config))


def test_of_a_gguf_file_and_of_none(tmp_path):
    write_tiny(tmp_path / "tiny.gguf", tiny_tensors(TINY), TINY)
    config, expected = weights.load(tmp_path / "tiny.gguf")
    mesh = parallel.make_mesh(jax.devices()[:2])

    def placed(made, like):
        """They lie as they are asked for, and are those on the host."""
        shardings = parallel.layout(trainable_shapes(made.model.config), mesh)
        found = made.trainable(shardings)
        assert jax.tree.map(lambda x: x.sharding, found) == shardings
        equal(found, like)

    of_file = base(tmp_path / "tiny.gguf", config=config)
    placed(of_file, expected)
    drawn, again = base(""), dataclasses.replace(base(""), seed=4)
    placed(drawn, drawn.trainable())
    assert np.any(np.asarray(drawn.trainable()["embedding"]) != np.asarray(again.trainable()["embedding"])), "the seed names what is drawn"
    with_adapters = base("", adapters=Lora(rank=2, alpha=4.0, targets=("query",)))
    equal(with_adapters.frozen(), drawn.trainable())
