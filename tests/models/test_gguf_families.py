"""Families of GGUF files: names against the gguf package's own, numbers against what llama.cpp's converter does, written out by hand here, and
sizes against what the published config.json of the same model is read as."""

import dataclasses
import math

import gguf
import jax
import numpy as np
import pytest

from pgrpo_jax.models import families, gguf_families, gguf_header, hugging_face, weights
from pgrpo_jax.models.config import ModelConfig, RopeScaling
from pgrpo_jax.models.gguf_families import FAMILIES
from pgrpo_jax.models.parameters import leaf, parameter_shapes

ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}  # fmt: skip
EPSILON = float(np.float32(1e-6))  # as a file holds it
LLAMA_3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# name -> (architecture, layers, width, MLP, heads, key heads, head size, vocabulary, context; further keys of config.json; further keys of the file)
PUBLISHED = {
    "SmolLM2 135M": ("llama", 30, 576, 1536, 9, 3, 64, 49152, 8192, {"rope_theta": 1e5}, {"rope.dimension_count": 64, "rope.freq_base": 1e5}),
    "Llama 3.2 1B": (
        "llama", 16, 2048, 8192, 32, 8, 64, 128256, 131072, {"rope_theta": 5e5, "rope_scaling": LLAMA_3},
        {"rope.dimension_count": 64, "rope.freq_base": 5e5, "attention.key_length": 64, "attention.value_length": 64},
    ),
    "Qwen 2.5 0.5B": ("qwen2", 24, 896, 4864, 14, 2, None, 151936, 32768, {"rope_theta": 1e6, "use_sliding_window": False}, {"rope.freq_base": 1e6}),
    "Qwen 3 0.6B": ("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, 40960, {"rope_theta": 1e6}, {"rope.freq_base": 1e6, "attention.key_length": 128}),
    "Gemma 2B": ("gemma", 18, 2048, 16384, 8, 1, 256, 256000, 8192, {"hidden_act": "gelu"}, {"attention.key_length": 256, "attention.value_length": 256}),
    "Gemma 2 9B": (
        "gemma2", 42, 3584, 14336, 16, 8, 256, 256000, 8192,
        {"query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        {"attention.key_length": 256, "attention.sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "Gemma 2 27B, a file of the first days": (
        "gemma2", 46, 4608, 36864, 32, 16, 128, 256000, 8192,
        {"query_pre_attn_scalar": 144, "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}, {"attention.key_length": 128},
    ),
    "Gemma 3 270M": (
        "gemma3", 18, 640, 2048, 4, 1, 256, 262144, 32768,
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "query_pre_attn_scalar": 256, "sliding_window": 512, "sliding_window_pattern": 6},
        {"rope.freq_base": 1e6, "attention.key_length": 256, "attention.value_length": 256, "attention.sliding_window": 512},
    ),
    "Gemma 3 27B": (
        "gemma3", 62, 5376, 21504, 32, 16, 128, 262208, 131072,
        {
            "rope_theta": 1e6, "rope_local_base_freq": 1e4, "query_pre_attn_scalar": 168, "sliding_window": 1024,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {
            "rope.freq_base": 1e6, "attention.key_length": 128, "attention.sliding_window": 1024, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0,
            "rope.freq_base_swa": 1e4, "attention.sliding_window_pattern": 6,
        },
    ),
}  # fmt: skip
TINY = dict(
    num_layers=7, width=24, mlp_width=40, num_heads=4, num_kv_heads=2, head_dim=6, vocab_size=50, context_length=64, rope_theta=500.0,
    norm_epsilon=EPSILON,
)  # fmt: skip


def metadata(name, sizes, extra):
    keys = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv", "context_length", "vocab_size")
    layers, width, mlp, heads, kv_heads, _, vocabulary, context = sizes
    values = dict(zip(keys, (layers, width, mlp, heads, kv_heads, context, vocabulary), strict=True))
    values |= {"attention.layer_norm_rms_epsilon": EPSILON} | extra
    return {"general.architecture": name} | {f"{name}.{key}": value for key, value in values.items()}


def header(values, tensors=100):
    return gguf_header.Header(values, {f"t{number}": None for number in range(tensors)})


def llama_3_factors(theta, head_dim, scaling):
    """As llama.cpp's convert_hf_to_gguf.py computes them (LlamaModel.generate_extra_tensors)."""
    found = []
    for frequency in 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim):
        wavelength, context = 2 * math.pi / frequency, scaling["original_max_position_embeddings"]
        if wavelength < context / scaling["high_freq_factor"]:
            found.append(1)
        elif wavelength > context / scaling["low_freq_factor"]:
            found.append(scaling["factor"])
        else:
            smooth = (context / wavelength - scaling["low_freq_factor"]) / (scaling["high_freq_factor"] - scaling["low_freq_factor"])
            found.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(found, np.float32)


@pytest.mark.parametrize("published", PUBLISHED)
def test_sizes_are_those_of_the_published_configuration(published):
    name, *sizes, of_json, of_file = PUBLISHED[published]
    layers, width, mlp, heads, kv_heads, head_dim, vocabulary, context = sizes
    values = {
        "architectures": [ARCHITECTURES[name]], "num_hidden_layers": layers, "hidden_size": width, "intermediate_size": mlp, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "max_position_embeddings": context, "rms_norm_eps": EPSILON, "tie_word_embeddings": True,
        **({"head_dim": head_dim} if head_dim else {}), **of_json,
    }  # fmt: skip
    expected = hugging_face.to_model_config(values)
    found = gguf_families.to_model_config(header(metadata(name, sizes, of_file)))
    if expected.rope_scaling and expected.rope_scaling.kind == "llama3":
        found = gguf_families.with_rope_factors(found, llama_3_factors(5e5, 64, LLAMA_3))
    if expected.query_scalar is not None:
        found = dataclasses.replace(found, query_scalar=found.query_scalar or found.head_dim)
    assert found == expected


def of_family(name):
    """(a small model of the family, random parameters of it: 64ths, to which adding 1 is exact)."""
    of, extra = FAMILIES[name], {"local_rope_theta": 77.0} if name == "gemma3" else {}
    caps = {"score_soft_cap": 2.5, "logit_soft_cap": 3.5} if name == "gemma2" else {"logit_soft_cap": 3.5} if name == "gemma3" else {}
    windows = tuple(0 if (layer + 1) % of.window_period == 0 else 5 for layer in range(7)) if of.window_period > 1 else ()
    scale = math.sqrt(24) if name.startswith("gemma") else 1.0
    tied = name in ("gemma", "gemma2")  # whose files never hold a head
    config = ModelConfig(**TINY, tied_embeddings=tied, **of.constants, **extra, **caps, windows=windows, embedding_scale=scale)
    rng = np.random.default_rng(1)
    return config, jax.tree.map(lambda spec: (rng.integers(-99, 99, spec.shape) / 64).astype(np.float32), parameter_shapes(config))


def permuted(weights, heads):
    """As llama.cpp's converter does with queries and keys (LlamaModel.permute)."""
    return weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def write(path, name, config, parameters, *, extra=None, tensors=None):
    """Writes what llama.cpp's converter makes of the tensors that transformers has, under the names that the gguf package gives them."""
    architecture = {arch: known for known, arch in gguf.MODEL_ARCH_NAMES.items()}[name]
    names = gguf.get_tensor_name_map(architecture, config.num_layers)
    sizes = (7, 24, 40, 4, 2, None, 50, 64)
    further = {"attention.key_length": 6, "rope.freq_base": 500.0} | ({"attention.sliding_window": 5} if config.windows else {})
    further |= {"rope.freq_base_swa": 77.0} if config.local_rope_theta else {}
    caps = {"attn_logit_softcapping": config.score_soft_cap, "final_logit_softcapping": config.logit_soft_cap}
    further |= {key: value for key, value in caps.items() if value}
    writer = gguf.GGUFWriter(path, name)
    for key, value in list(metadata(name, sizes, further | (extra or {})).items())[1:]:
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}[type(value)](key, value)
    written = {}
    for source, place in families.placements(families.hugging_face_rules(config), config).items():
        parameter = leaf(parameters, place.rule.path)
        tensor = families.from_parameter(parameter[place.row], place)
        if name == "llama" and ("q_proj" in source or "k_proj" in source):
            tensor = permuted(tensor, 4 if "q_proj" in source else 2)
        if name.startswith("gemma") and source.endswith("norm.weight"):
            tensor = tensor + np.float32(1)
        stem, kind = source.rsplit(".", 1)
        written[f"{names.get_name(stem)}.{kind}"] = tensor
    for stored, tensor in (written | (tensors or {})).items():
        writer.add_tensor(stored, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_a_converted_model_comes_back(name, tmp_path):
    config, parameters = of_family(name)
    found, loaded = weights.load(write(tmp_path / "m.gguf", name, config, parameters))
    assert found == config
    jax.tree.map(lambda ours, theirs: np.testing.assert_array_equal(ours, theirs, strict=True), loaded, parameters)


def test_llama_3s_factors_are_recognised(tmp_path):
    config, parameters = of_family("llama")
    factors = llama_3_factors(3e8, 6, LLAMA_3 | {"factor": 8.0})
    assert factors[0] == 1 < factors[1] < factors[2] == 8
    path = write(tmp_path / "m.gguf", "llama", config, parameters, extra={"rope.freq_base": 3e8}, tensors={"rope_freqs.weight": factors})
    assert weights.read_config(path).rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192) == weights.load(path)[0].rope_scaling


@pytest.mark.parametrize(
    "name, tensors, message",
    [
        ("llama", {"rope_freqs.weight": np.array([1, 1, 1.5], np.float32)}, r"rope_freqs.weight reaches to 1.5, and is not what Llama 3's scaling"),
        ("llama", {"rope_freqs.weight": np.array([8, 1, 8], np.float32)}, "rope_freqs.weight reaches to 8.0, and is not"),
        ("llama", {"rope_freqs.weight": np.array([1, 1, np.nan], np.float32)}, "rope_freqs.weight reaches to nan"),
        ("llama", {"rope_freqs.weight": np.ones(4, np.float32)}, r"rope_freqs.weight is \(4,\), must be \(3,\)"),
        ("qwen3", {"rope_freqs.weight": np.ones(3, np.float32)}, r"unexpected \(1\): rope_freqs.weight"),
        ("qwen3", {"blk.3.attn_q.bias": np.ones(24, np.float32)}, r"unexpected \(1\): blk.3.attn_q.bias"),
        ("qwen2", {"blk.3.attn_output.bias": np.ones(24, np.float32)}, r"unexpected \(1\): blk.3.attn_output.bias"),
    ],
)
def test_tensors_that_are_not_computed_are_refused(name, tensors, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        weights.read_config(write(tmp_path / "m.gguf", name, *of_family(name), tensors=tensors))


@pytest.mark.parametrize(
    "name, extra, message",
    [
        ("qwen2", {"attention.sliding_window": 4096}, "qwen2.attention.sliding_window is 4096, must be 0 or absent"),
        ("qwen2", {"rope.scaling.type": "yarn"}, "qwen2.rope.scaling.type is 'yarn', must be 'none', 'linear' or absent"),
        ("qwen2", {"rope.scaling.factor": 4}, "qwen2.rope.scaling.factor is 4, must be a floating-point number"),
        ("qwen2", {"rope.scaling.factor": 0.5}, "rope scaling's factor is 0.5"),
        ("qwen3", {"attention.causal": False}, "qwen3.attention.causal is False, must be True or absent"),
        ("qwen3", {"final_logit_softcapping": 30.0}, "qwen3.final_logit_softcapping is 30.0, must be 0.0 or absent"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "gemma3.attn_logit_softcapping is 50.0, must be 0.0 or absent"),
        ("gemma3", {"attention.sliding_window": None}, "gemma3.attention.sliding_window is None, must be a whole number from 1 on"),
        ("gemma3", {"attention.sliding_window": 0}, "gemma3.attention.sliding_window is 0, must be"),
        ("gemma3", {"attention.sliding_window_pattern": np.array([True, False])}, "gemma3.attention.sliding_window_pattern is"),
        ("gemma3", {"attention.key_length_swa": 128}, "gemma3.attention.key_length_swa is 128, must be the head size 256"),
        ("gemma2", {"final_logit_softcapping": 30}, "gemma2.final_logit_softcapping is 30, must be a floating-point number"),
        ("gemma2", {"final_logit_softcapping": float("nan")}, "logit_soft_cap is nan"),
        ("gemma", {"attention.head_count": 7, "attention.key_length": None}, "no single value for gemma.attention.key_length"),
    ],
)
def test_metadata_that_is_not_computed_is_refused(name, extra, message):
    sizes = (18, 640, 2048, 4, 1, 256, 262144, 32768)
    values = metadata(name, sizes, {"attention.key_length": 256, "attention.sliding_window": 512 if name == "gemma3" else 0} | extra)
    with pytest.raises(ValueError, match=message):
        gguf_families.to_model_config(header({key: value for key, value in values.items() if value is not None}))


def test_a_factor_without_a_kind_is_linear_and_none_is_none():
    sizes = (18, 640, 2048, 4, 1, 256, 262144, 32768)
    for kind, expected in (({}, RopeScaling("linear", 4.0)), ({"rope.scaling.type": "none"}, None), ({"rope.scaling.type": "linear"}, RopeScaling("linear", 4.0))):
        assert gguf_families.to_model_config(header(metadata("qwen2", sizes, {"rope.scaling.factor": 4.0} | kind))).rope_scaling == expected


@pytest.mark.parametrize("name", ["gpt2", None, ["llama"]])
def test_unknown_architecture_names_the_known_ones(name):
    with pytest.raises(ValueError, match="known are gemma, gemma2, gemma3, llama, qwen2, qwen3"):
        gguf_families.family(name)
