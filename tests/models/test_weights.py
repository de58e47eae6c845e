"""The loader: against the gguf package and a hand-written mapping, on SmolLM2-135M and on tiny files, sound and damaged."""

import os
import pathlib
import tracemalloc

import gguf
import jax
import numpy as np
import pytest

from pgrpo_jax.models import families, gguf_families, tokenizer, weights
from pgrpo_jax.models.config import ModelConfig
from pgrpo_jax.models.parameters import parameter_shapes

MODEL = pathlib.Path(".assets/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf")
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TINY = dict(
    num_layers=2, width=32, mlp_width=64, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=9, context_length=16, rope_theta=500.0,
    norm_epsilon=1e-5, tied_embeddings=True,
)  # fmt: skip
TOKENS = ["a", "b", "c", "ab", "<e>", "<s>", "u", "s", "Ċ"]
TEMPLATE = "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '<e>' }}{% endfor %}"


@pytest.fixture(scope="module")
def smollm2():
    if not MODEL.is_file():
        pytest.fail(f"{MODEL} is missing: run launch/test.sh, which fetches it")
    return *weights.load(MODEL.parent), gguf.GGUFReader(MODEL)


def tiny_tensors(config, seed=0):
    """Random tensors under llama.cpp's names, [outputs, inputs]."""
    rng = np.random.default_rng(seed)
    d, f = config["width"], config["mlp_width"]
    q, kv = config["num_heads"] * config["head_dim"], config["num_kv_heads"] * config["head_dim"]
    shapes = {"token_embd": (config["vocab_size"], d), "output_norm": (d,)}
    if not config["tied_embeddings"]:
        shapes["output"] = (config["vocab_size"], d)
    layer = {"attn_norm": (d,), "attn_q": (q, d), "attn_k": (kv, d), "attn_v": (kv, d), "attn_output": (d, q), "ffn_norm": (d,)}
    layer |= {"ffn_gate": (f, d), "ffn_up": (f, d), "ffn_down": (d, f)}
    for index in range(config["num_layers"]):
        shapes |= {f"blk.{index}.{name}": shape for name, shape in layer.items()}
    return {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_tiny(path, tensors, config, *, architecture="llama", kinds=None, extra=None):
    """Writes a GGUF file with the gguf package; `kinds` names a quantisation for some tensors, `extra` overrides metadata."""
    writer = gguf.GGUFWriter(path, architecture)
    metadata = {
        "block_count": config["num_layers"], "context_length": config["context_length"], "embedding_length": config["width"],
        "feed_forward_length": config["mlp_width"], "attention.head_count": config["num_heads"],
        "attention.head_count_kv": config["num_kv_heads"], "rope.dimension_count": config["head_dim"],
        "vocab_size": config["vocab_size"], "rope.freq_base": config["rope_theta"],
        "attention.layer_norm_rms_epsilon": config["norm_epsilon"],
    }  # fmt: skip
    for key, value in {**metadata, **(extra or {})}.items():
        if isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
        elif value is not None:
            {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token.startswith("<") else 1 for token in TOKENS])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(TOKENS.index("<e>"))
    writer.add_chat_template(TEMPLATE)
    for name, tensor in tensors.items():
        kind = (kinds or {}).get(name, gguf.GGMLQuantizationType.F32)
        data = tensor if tensor.dtype == np.uint8 else gguf.quantize(tensor, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_real_model_is_accounted_for(smollm2):
    config, parameters, oracle = smollm2
    assert config == ModelConfig(
        num_layers=30, width=576, mlp_width=1536, num_heads=9, num_kv_heads=3, head_dim=64, vocab_size=49152, context_length=8192,
        rope_theta=1e5, norm_epsilon=float(np.float32(1e-5)), tied_embeddings=True,
    )  # fmt: skip
    assert weights.read_config(MODEL) == config
    leaves = jax.tree.leaves(parameters)
    assert len(oracle.tensors) == 272 == len(families.placements(gguf_families.FAMILIES["llama"].tensors, config))
    assert sum(leaf.size for leaf in leaves) == 134_515_008 == sum(tensor.n_elements for tensor in oracle.tensors)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), parameters) == jax.tree.map(
        lambda spec: (spec.shape, spec.dtype), parameter_shapes(config)
    )


@pytest.mark.parametrize("layer", [0, 17, 29])
def test_real_tensors_lie_where_a_mapping_written_by_hand_puts_them(smollm2, layer):
    _, parameters, oracle = smollm2
    stored = {tensor.name: tensor for tensor in oracle.tensors}

    def read(name):
        return gguf.dequantize(stored[name].data, stored[name].tensor_type)

    ours = {name: array[layer] for name, array in parameters["layers"].items()}
    # row 2i of a head in the file is channel i, row 2i + 1 is channel i + 32
    channel_to_row = [2 * i for i in range(32)] + [2 * i + 1 for i in range(32)]
    for name, source, heads in (("query", "attn_q", 9), ("key", "attn_k", 3)):
        rows = read(f"blk.{layer}.{source}.weight").reshape(heads, 64, 576)[:, channel_to_row]
        np.testing.assert_array_equal(ours[name], np.einsum("hcd->dhc", rows))
    np.testing.assert_array_equal(ours["value"], np.einsum("hcd->dhc", read(f"blk.{layer}.attn_v.weight").reshape(3, 64, 576)))
    np.testing.assert_array_equal(ours["output"], np.einsum("dhc->hcd", read(f"blk.{layer}.attn_output.weight").reshape(576, 9, 64)))
    for name in ("gate", "up", "down"):
        np.testing.assert_array_equal(ours[name], np.einsum("oi->io", read(f"blk.{layer}.ffn_{name}.weight")))
    np.testing.assert_array_equal(ours["attention_norm"], read(f"blk.{layer}.attn_norm.weight"))
    np.testing.assert_array_equal(ours["mlp_norm"], read(f"blk.{layer}.ffn_norm.weight"))
    np.testing.assert_array_equal(parameters["final_norm"], read("output_norm.weight"))
    np.testing.assert_array_equal(parameters["embedding"][::1000], read("token_embd.weight")[::1000])


def test_rotating_halves_of_the_loaded_weights_scores_as_rotating_pairs_of_the_stored_ones(tmp_path):
    tensors = tiny_tensors(TINY)
    _, parameters = weights.load(write_tiny(tmp_path / "m.gguf", tensors, TINY))
    rng, d, dh = np.random.default_rng(5), TINY["width"], TINY["head_dim"]
    x, y = rng.standard_normal((2, d))
    for position in (0, 1, 11):
        angles = position * TINY["rope_theta"] ** (-np.arange(0, dh, 2) / dh)
        cos, sin = np.cos(angles), np.sin(angles)
        q = (tensors["blk.1.attn_q.weight"].astype(np.float64) @ x).reshape(-1, dh)[1]
        k = (tensors["blk.1.attn_k.weight"].astype(np.float64) @ y).reshape(-1, dh)[0]
        turned = np.stack([q[0::2] * cos - q[1::2] * sin, q[0::2] * sin + q[1::2] * cos], axis=-1).ravel()
        q2 = x @ parameters["layers"]["query"][1, :, 1].astype(np.float64)
        k2 = y @ parameters["layers"]["key"][1, :, 0].astype(np.float64)
        a, b = np.split(q2, 2)
        np.testing.assert_allclose(np.concatenate([a * cos - b * sin, a * sin + b * cos]) @ k2, turned @ k, rtol=1e-12)


def test_untied_model_has_a_head(tmp_path):
    sizes = {**TINY, "tied_embeddings": False}
    tensors = tiny_tensors(sizes)
    config, parameters = weights.load(write_tiny(tmp_path / "m.gguf", tensors, sizes))
    assert not config.tied_embeddings
    np.testing.assert_array_equal(parameters["head"], tensors["output.weight"].T)


QUANTISED = "F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0".split()


@pytest.mark.parametrize("kind", QUANTISED + "Q2_K Q3_K Q4_K Q5_K Q6_K".split())
def test_every_supported_coding_is_decoded(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    sizes = {**TINY, "num_layers": 1, "mlp_width": 256}  # K-quants code 256 numbers at a time
    tensors = tiny_tensors(sizes)
    name = "blk.0.ffn_down.weight"
    if kind.name not in QUANTISED:  # the package can only decode these: bytes whose float16 scales are finite
        shape = gguf.quant_shape_to_byte_shape((32, 256), kind)
        tensors[name] = np.random.default_rng(1).integers(0x20, 0x3C, shape, dtype=np.uint8)
        expected = gguf.dequantize(tensors[name], kind)
    else:
        expected, tolerance = tensors[name], {"F16": 1e-3, "BF16": 1e-2, "Q8_0": 0.05}.get(kind.name, 0.5)
    path = write_tiny(tmp_path / "m.gguf", tensors, sizes, kinds={name: kind})
    down = weights.load(path)[1]["layers"]["down"][0]
    if kind.name in QUANTISED:
        np.testing.assert_allclose(down, expected.T, atol=tolerance, rtol=0.02)
        expected = gguf.dequantize(gguf.quantize(expected, kind), kind)
    np.testing.assert_array_equal(down, expected.T)


def test_missing_unexpected_and_misshapen_tensors_are_listed_together(tmp_path):
    tensors = tiny_tensors(TINY)
    del tensors["blk.0.attn_q.weight"], tensors["output_norm.weight"]
    tensors["blk.1.attn_q.bias"] = np.zeros(32, np.float32)
    tensors["rope_factors_long.weight"] = np.zeros(4, np.float32)
    tensors["blk.1.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"].T.copy()
    path = write_tiny(tmp_path / "m.gguf", tensors, TINY)
    for function in (weights.read_config, weights.load):
        with pytest.raises(ValueError) as caught:
            function(path)
        message = str(caught.value)
        assert "missing (2): output_norm.weight, blk.0.attn_q.weight" in message
        assert "unexpected (2): blk.1.attn_q.bias, rope_factors_long.weight" in message
        assert "wrong shape (1): blk.1.ffn_up.weight is (32, 64), must be (64, 32)" in message and "\n" not in message


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"block_count": 10**9}, "num_layers is 1000000000, the file has only 20 tensors"),
        ({"block_count": 21}, "num_layers is 21, the file has only 20 tensors"),
        ({"block_count": None}, "no single value for llama.block_count"),
        ({"attention.head_count": [4, 4]}, "no single value for llama.attention.head_count: the file"),
        ({"vocab_size": 10}, "llama.vocab_size is 10, the tokenizer has 9 tokens"),
        ({"embedding_length": 0}, "width is 0, must be a whole number"),
        ({"attention.head_count_kv": 3}, "num_heads is 4, must be a multiple of num_kv_heads 3"),
        ({"attention.key_length": 16}, "llama.rope.dimension_count is 8, must be the head size 16"),
        ({"attention.value_length": 16}, "llama.attention.value_length is 16, must be the head size 8"),
        ({"rope.freq_base": float("nan")}, "rope_theta is nan"),
        ({"rope.freq_base": "ten"}, "llama.rope.freq_base is 'ten', must be a floating-point number"),
        ({"rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn', must be 'none', 'linear' or absent"),
        ({"expert_count": 8}, "llama.expert_count is 8, must be 0 or absent"),
        ({"embedding_length": 64}, "wrong shape"),
    ],
)
def test_absurd_metadata_is_refused_by_the_header_alone(tmp_path, extra, message):
    path = write_tiny(tmp_path / "m.gguf", tiny_tensors(TINY), TINY, extra=extra)
    with pytest.raises(ValueError, match=message):
        weights.read_config(path)


def test_optional_metadata_has_the_defaults_of_the_format(tmp_path):
    sizes = {**TINY, "num_kv_heads": 4}
    path = write_tiny(
        tmp_path / "m.gguf", tiny_tensors(sizes), sizes,
        extra={"attention.head_count_kv": None, "rope.freq_base": None, "vocab_size": None, "rope.scaling.type": "none"},
    )  # fmt: skip
    config = weights.read_config(path)
    assert (config.num_kv_heads, config.rope_theta, config.vocab_size) == (4, 10000.0, 9)


def test_unknown_architecture_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="architecture is 'mamba', known are gemma, gemma2, gemma3, llama, qwen2, qwen3"):
        weights.read_config(write_tiny(tmp_path / "m.gguf", tiny_tensors(TINY), TINY, architecture="mamba"))


def test_peak_memory_is_about_the_float32_model(tmp_path):
    sizes = {**TINY, "num_layers": 8, "width": 128, "mlp_width": 2048}
    tensors = tiny_tensors(sizes)
    kinds = {name: gguf.GGMLQuantizationType.Q8_0 for name in tensors if ".ffn_" in name and "norm" not in name}
    path = write_tiny(tmp_path / "m.gguf", tensors, sizes, kinds=kinds)
    tracemalloc.start()
    try:
        _, parameters = weights.load(path)
        assert tracemalloc.get_traced_memory()[1] < 1.25 * sum(leaf.nbytes for leaf in jax.tree.leaves(parameters))
    finally:
        tracemalloc.stop()


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    tensors = tiny_tensors(TINY)
    tensors["blk.1.ffn_gate.weight"][3, 4] = np.inf
    path = write_tiny(tmp_path / "m.gguf", tensors, TINY)
    assert weights.read_config(path).num_layers == 2  # the header is sound
    with pytest.raises(ValueError, match="tensor 'blk.1.ffn_gate.weight' .* not finite"):
        weights.load(path)


def test_a_damaged_scale_is_refused_without_a_warning(tmp_path):
    tensors, name = tiny_tensors(TINY), "blk.0.ffn_up.weight"
    tensors[name] = np.full(gguf.quant_shape_to_byte_shape((64, 32), gguf.GGMLQuantizationType.Q8_0), 0x7C, np.uint8)
    tensors[name][0] = 0
    tensors[name][0, 1] = 0x7C  # the float16 scale is infinite, the numbers it scales are 0
    path = write_tiny(tmp_path / "m.gguf", tensors, TINY, kinds={name: gguf.GGMLQuantizationType.Q8_0})
    with pytest.raises(ValueError, match="not finite"):
        weights.load(path)


def test_locate_lists_what_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model at .*nowhere"):
        weights.locate(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="there is: nothing"):
        weights.locate(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "old.gguf").mkdir()
    with pytest.raises(FileNotFoundError, match="there is: config.json, old.gguf"):
        weights.locate(tmp_path)
    (tmp_path / "b.GGUF").write_bytes(b"x")
    assert weights.locate(str(tmp_path)) == tmp_path / "b.GGUF" == weights.locate(tmp_path / "b.GGUF")
    assert weights.digest(tmp_path) == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    (tmp_path / "a.gguf").write_bytes(b"y")
    with pytest.raises(ValueError, match="2 .gguf files in .*a.gguf, b.GGUF"):
        weights.locate(tmp_path)


def test_digest_of_the_real_file():
    if not MODEL.is_file():
        pytest.fail(f"{MODEL} is missing: run launch/test.sh, which fetches it")
    assert weights.digest(MODEL) == SHA256


class Damage:
    """A tiny file, and what becomes of loading it after damage: the same shapes or a ValueError, nothing else."""

    def __init__(self, folder):
        sizes = {**TINY, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "mlp_width": 32}
        kinds = {f"blk.0.{name}.weight": gguf.GGMLQuantizationType.Q8_0 for name in ("attn_q", "attn_k", "ffn_gate", "ffn_up", "ffn_down")}
        self.path = write_tiny(folder / "m.gguf", tiny_tensors(sizes), sizes, kinds=kinds)
        self.content = self.path.read_bytes()
        self.header_bytes = min(tensor.data_offset for tensor in gguf.GGUFReader(self.path).tensors)
        self.shapes = self.load()

    def load(self):
        _, parameters = weights.load(self.path)
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), parameters)

    def survives(self, content):
        self.path.write_bytes(content)
        loaded = 0
        try:
            assert self.load() == self.shapes
            loaded = 1
        except ValueError as error:
            assert "\n" not in str(error)
        try:
            tokenizer.load(self.path).render_chat("ab")
        except ValueError as error:
            assert str(self.path) in str(error) or "chat template" in str(error)
        return loaded


def test_every_truncation_is_refused(tmp_path):
    damage = Damage(tmp_path)
    end = max(tensor.data_offset + tensor.n_bytes for tensor in gguf.GGUFReader(damage.path).tensors)
    for size in range(len(damage.content) - 1, -1, -1):
        os.truncate(damage.path, size)
        if size >= end:
            assert damage.load() == damage.shapes  # only padding is gone
        else:
            with pytest.raises(ValueError, match="cannot read .* as GGUF"):
                weights.read_config(damage.path)


def test_random_damage_to_the_header_loads_equal_shapes_or_is_refused(tmp_path):
    damage, rng = Damage(tmp_path), np.random.default_rng(2603)
    loaded = 0
    for _ in range(600):
        content = bytearray(damage.content)
        for position in rng.integers(0, damage.header_bytes, rng.integers(1, 4)):
            content[position] = rng.integers(256)
        loaded += damage.survives(bytes(content))
    assert 0 < loaded < 600  # both ends are exercised: letters of unused metadata change nothing


@pytest.mark.parametrize("word", [b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f", b"\0\0\0\0\1\0\0\0"])
def test_extreme_words_anywhere_in_the_header_load_equal_shapes_or_are_refused(tmp_path, word):
    damage = Damage(tmp_path)
    for position in range(0, damage.header_bytes - 8, 3):
        damage.survives(damage.content[:position] + word + damage.content[position + 8 :])
