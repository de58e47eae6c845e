import dataclasses
import math

import jax
import numpy as np
import pytest

from pgrpo_jax.models import families

SIZES = dict(
    num_layers=3, width=24, mlp_width=40, num_heads=4, num_kv_heads=2, head_dim=6, vocab_size=50, context_length=64,
    rope_theta=1e4, norm_epsilon=1e-5, tied_embeddings=False,
)  # fmt: skip


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("num_layers", 0, r"num_layers is 0, must be a whole number in \[1, "),
        ("width", 24.0, "width is 24.0, must be a whole number"),
        ("vocab_size", 2**31, "vocab_size is 2147483648, must be"),
        ("mlp_width", True, "mlp_width is True, must be a whole number"),
        ("num_kv_heads", 3, "num_heads is 4, must be a multiple of num_kv_heads 3"),
        ("head_dim", 5, "head_dim is 5, must be even"),
        ("rope_theta", math.nan, "rope_theta is nan, must be finite and above 0"),
        ("rope_theta", 0.0, "rope_theta is 0.0"),
        ("norm_epsilon", 0.0, r"norm_epsilon is 0.0, must be in \(0, 1\)"),
        ("tied_embeddings", 1, "tied_embeddings is 1, must be True or False"),
    ],
)
def test_impossible_sizes_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        families.ModelConfig(**{**SIZES, field: value})


def test_parameter_tree_has_the_documented_shapes():
    config = families.ModelConfig(**SIZES)
    shapes = jax.tree.map(lambda spec: spec.shape, families.parameter_shapes(config))
    assert shapes == {
        "embedding": (50, 24),
        "final_norm": (24,),
        "head": (24, 50),
        "layers": {
            "attention_norm": (3, 24), "query": (3, 24, 4, 6), "key": (3, 24, 2, 6), "value": (3, 24, 2, 6), "output": (3, 4, 6, 24),
            "mlp_norm": (3, 24), "gate": (3, 24, 40), "up": (3, 24, 40), "down": (3, 40, 24),
        },
    }  # fmt: skip
    assert {spec.dtype for spec in jax.tree.leaves(families.parameter_shapes(config))} == {np.dtype(np.float32)}
    assert "head" not in families.parameter_shapes(dataclasses.replace(config, tied_embeddings=True))


def test_every_parameter_has_exactly_one_source_for_each_layer():
    config = families.ModelConfig(**SIZES)
    places = families.placements(families.LLAMA, config)
    filled = [(place.rule.path, place.layer) for place in places.values()]
    assert len(set(filled)) == len(filled) == 3 + 9 * 3
    assert sum(math.prod(place.source_shape) for place in places.values()) == sum(
        math.prod(spec.shape) for spec in jax.tree.leaves(families.parameter_shapes(config))
    )
    assert len(families.placements(families.LLAMA, dataclasses.replace(config, tied_embeddings=True))) == 2 + 9 * 3


@pytest.mark.parametrize("name", ["gpt2", None, ["llama"]])
def test_unknown_architecture_names_the_known_ones(name):
    with pytest.raises(ValueError, match="known are llama"):
        families.family(name)
