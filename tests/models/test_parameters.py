"""The tree of parameters: shape by shape."""

import dataclasses

import jax
import numpy as np

from pgrpo_jax.models.config import ModelConfig
from pgrpo_jax.models.parameters import parameter_shapes

SIZES = dict(
    num_layers=3, width=24, mlp_width=40, num_heads=4, num_kv_heads=2, head_dim=6, vocab_size=50, context_length=64,
    rope_theta=1e4, norm_epsilon=1e-5, tied_embeddings=False,
)  # fmt: skip


def test_parameter_tree_has_the_documented_shapes():
    config = ModelConfig(**SIZES)
    shapes = jax.tree.map(lambda spec: spec.shape, parameter_shapes(config))
    assert shapes == {
        "embedding": (50, 24),
        "final_norm": (24,),
        "head": (24, 50),
        "layers": {
            "attention_norm": (3, 24), "query": (3, 24, 4, 6), "key": (3, 24, 2, 6), "value": (3, 24, 2, 6), "output": (3, 4, 6, 24),
            "mlp_norm": (3, 24), "gate": (3, 24, 40), "up": (3, 24, 40), "down": (3, 40, 24),
        },
    }  # fmt: skip
    assert {spec.dtype for spec in jax.tree.leaves(parameter_shapes(config))} == {np.dtype(np.float32)}
    assert "head" not in parameter_shapes(dataclasses.replace(config, tied_embeddings=True))


def test_what_families_add():
    plain = parameter_shapes(ModelConfig(**SIZES))["layers"]
    more = {
        "qkv_bias": {"query_bias": (3, 4, 6), "key_bias": (3, 2, 6), "value_bias": (3, 2, 6)},
        "qk_norm": {"query_norm": (3, 6), "key_norm": (3, 6)},
        "post_norms": {"post_attention_norm": (3, 24), "post_mlp_norm": (3, 24)},
    }
    for field, shapes in more.items():
        found = parameter_shapes(ModelConfig(**{**SIZES, field: True}))["layers"]
        assert {name: spec.shape for name, spec in found.items() if name not in plain} == shapes


def test_experts_take_the_place_of_the_mlp():
    plain = parameter_shapes(ModelConfig(**SIZES))["layers"]
    found = parameter_shapes(ModelConfig(**SIZES, num_experts=5, experts_per_token=2))["layers"]
    assert plain.keys() - found.keys() == {"gate", "up", "down"}
    assert {name: spec.shape for name, spec in found.items() if name not in plain} == {
        "router": (3, 24, 5), "expert_gate": (3, 5, 24, 40), "expert_up": (3, 5, 24, 40), "expert_down": (3, 5, 40, 24)
    }  # fmt: skip
