"""Which tensor becomes which parameter."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from pgrpo_jax.models import families
from pgrpo_jax.models.config import ModelConfig
from pgrpo_jax.models.gguf_families import FAMILIES
from pgrpo_jax.models.parameters import parameter_shapes

SIZES = dict(
    num_layers=3, width=24, mlp_width=40, num_heads=4, num_kv_heads=2, head_dim=6, vocab_size=50, context_length=64,
    rope_theta=1e4, norm_epsilon=1e-5, tied_embeddings=False,
)  # fmt: skip


def test_every_parameter_has_exactly_one_source_for_each_layer():
    config = ModelConfig(**SIZES)
    rules = families.hugging_face_rules(config)
    places = families.placements(rules, config)
    filled = [(place.rule.path, place.row) for place in places.values()]
    assert len(set(filled)) == len(filled) == 3 + 9 * 3
    assert sum(math.prod(place.source_shape) for place in places.values()) == sum(
        math.prod(spec.shape) for spec in jax.tree.leaves(parameter_shapes(config))
    )
    assert len(families.placements(rules, dataclasses.replace(config, tied_embeddings=True))) == 2 + 9 * 3


MOE = ModelConfig(**SIZES, num_experts=5, experts_per_token=2)


def test_each_expert_has_tensors_of_its_own():
    places = families.placements(families.hugging_face_rules(MOE), MOE)
    assert len(places) == 3 + 3 * (6 + 1 + 3 * 5)
    place = places["model.layers.2.mlp.experts.4.down_proj.weight"]
    assert (place.rule.path, place.row, place.source_shape, place.shape) == (("layers", "expert_down"), (2, 4), (24, 40), (40, 24))
    assert places["model.layers.1.mlp.gate.weight"].row == (1,) and places["model.norm.weight"].row == ()
    filled = {(place.rule.path, place.row) for place in places.values()}
    assert len(filled) == len(places)
    assert sum(math.prod(place.shape) for place in places.values()) == sum(math.prod(spec.shape) for spec in jax.tree.leaves(parameter_shapes(MOE)))


@pytest.mark.parametrize("rules", [families.hugging_face_rules(ModelConfig(**SIZES)), *(family.tensors for family in FAMILIES.values()), None], ids=["Hugging Face", *FAMILIES, "experts"])
def test_a_parameter_becomes_its_tensor_again(rules):
    rng = np.random.default_rng(0)
    config = MOE if rules is None else ModelConfig(**SIZES, qkv_bias=True, qk_norm=True, post_norms=True)
    for name, place in families.placements(rules or families.hugging_face_rules(MOE), config).items():
        tensor = rng.integers(-99, 99, place.source_shape) / 8  # exact, a shift forth and back too
        np.testing.assert_array_equal(families.from_parameter(families.to_parameter(tensor, place), place), tensor, err_msg=name)
