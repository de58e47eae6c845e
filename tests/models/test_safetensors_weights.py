"""Hugging Face directories: against tensors laid out by hand, whole and in shards, on one device and on eight, and against files that mean harm."""

import json
import pathlib
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings, strategies

from pgrpo_jax import parallel
from pgrpo_jax.models import safetensors_weights, weights

L, D, F, H, KV, DH, V = 3, 8, 12, 4, 2, 6, 14
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": H,
    "num_key_value_heads": KV, "head_dim": DH, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip


def tensors(dtype=np.float32, *, tied=False):
    """What transformers would save for a Qwen 2 of these sizes, random."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not tied:
        shapes["lm_head.weight"] = (V, D)
    for layer in range(L):
        of = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,), "mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D)}
        of |= {"mlp.down_proj.weight": (D, F), "self_attn.o_proj.weight": (D, H * DH)}
        for name, heads in (("q", H), ("k", KV), ("v", KV)):
            of |= {f"self_attn.{name}_proj.weight": (heads * DH, D), f"self_attn.{name}_proj.bias": (heads * DH,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of.items()}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write(directory, of, *, files=1, config=CONFIG):
    """A directory of some files, tensors dealt out in turn."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if files == 1:
        safetensors.numpy.save_file(of, directory / "model.safetensors")
        return directory
    names = {name: f"model-{n % files + 1:05d}-of-{files:05d}.safetensors" for n, name in enumerate(of)}
    for file in set(names.values()):
        safetensors.numpy.save_file({name: of[name] for name in of if names[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return directory


def check(params, of):
    """Each parameter against its tensors, by hand."""
    of = {name: tensor.astype(np.float32) for name, tensor in of.items()}
    np.testing.assert_array_equal(params["embedding"], of["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["final_norm"], of["model.norm.weight"])
    if "head" in params:
        np.testing.assert_array_equal(params["head"], of["lm_head.weight"].T)
    for layer in range(L):
        got = {name: np.asarray(stacked[layer]) for name, stacked in params["layers"].items()}
        hf = {name.removeprefix(f"model.layers.{layer}."): tensor for name, tensor in of.items() if f"layers.{layer}." in name}
        for name, heads in (("query", H), ("key", KV), ("value", KV)):
            for head in range(heads):
                rows = slice(head * DH, (head + 1) * DH)
                np.testing.assert_array_equal(got[name][:, head], hf[f"self_attn.{name[0]}_proj.weight"][rows].T)
                np.testing.assert_array_equal(got[f"{name}_bias"][head], hf[f"self_attn.{name[0]}_proj.bias"][rows])
        for head in range(H):
            np.testing.assert_array_equal(got["output"][head], hf["self_attn.o_proj.weight"][:, head * DH : (head + 1) * DH].T)
        for name in ("gate", "up", "down"):
            np.testing.assert_array_equal(got[name], hf[f"mlp.{name}_proj.weight"].T)
        np.testing.assert_array_equal(got["attention_norm"], hf["input_layernorm.weight"])
        np.testing.assert_array_equal(got["mlp_norm"], hf["post_attention_layernorm.weight"])


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["float32", "float16", "bfloat16"])
def test_parameters_are_the_tensors(files, dtype, tmp_path):
    of = tensors(dtype)
    config, params = weights.load(write(tmp_path, of, files=files))
    assert (config.num_layers, config.qkv_bias, config.tied_embeddings) == (L, True, False)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    check(params, of)


@pytest.mark.parametrize("fsdp, tp", [(4, 2), (8, 1), (2, 1), (1, 2)])
def test_devices_read_what_they_hold(fsdp, tp, tmp_path, monkeypatch):
    of = tensors()
    directory = write(tmp_path, of, files=2)
    config = weights.read_config(directory)
    mesh = parallel.make_mesh(jax.devices(), fsdp=fsdp, tp=tp)
    shardings = parallel.layout(safetensors_weights.parameter_shapes(config), mesh)
    read, original = [], safetensors_weights._read
    monkeypatch.setattr(safetensors_weights, "_read", lambda *arguments: read.append(out := original(*arguments)) or out)
    params = safetensors_weights.load(directory, config, shardings)
    assert jax.tree.leaves(jax.tree.map(lambda x: x.sharding, params)) == jax.tree.leaves(shardings)
    assert max(part.size for part in read) == max(np.prod(s.sharding.shard_shape(s.shape)[int(s.ndim > 2) :]) for s in jax.tree.leaves(params))
    check(jax.device_get(params), of)


E = 4
MOE = {
    **CONFIG, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": E, "num_experts_per_tok": 2, "moe_intermediate_size": F, "intermediate_size": 99,
}  # fmt: skip


def of_experts(dtype=np.float32):
    """What transformers would save for a Qwen 3 MoE, random."""
    kept = {name: tensor.astype(dtype) for name, tensor in tensors().items() if "bias" not in name and "mlp" not in name}
    rng = np.random.default_rng(1)
    for layer in range(L):
        shapes = {"mlp.gate.weight": (E, D), "self_attn.q_norm.weight": (DH,), "self_attn.k_norm.weight": (DH,)}
        for expert in range(E):
            shapes |= {f"mlp.experts.{expert}.{name}_proj.weight": (D, F) if name == "down" else (F, D) for name in ("gate", "up", "down")}
        kept |= {f"model.layers.{layer}.{name}": rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    return kept


@pytest.mark.parametrize("sizes", [None, dict(expert=2, fsdp=2, tp=2), dict(expert=4)])
def test_devices_read_the_experts_they_hold(sizes, tmp_path, monkeypatch):
    of = of_experts()
    directory = write(tmp_path, of, files=3, config=MOE)
    config = weights.read_config(directory)
    read, original = [], safetensors_weights._read
    monkeypatch.setattr(safetensors_weights, "_read", lambda tensor, place, spans: read.append((place, out := original(tensor, place, spans))) or out)
    mesh = parallel.make_mesh(jax.devices(), **sizes) if sizes else None
    shardings = parallel.layout(safetensors_weights.parameter_shapes(config), mesh) if sizes else None
    params = jax.device_get(safetensors_weights.load(directory, config, shardings))["layers"]
    for layer in range(L):
        np.testing.assert_array_equal(params["router"][layer], of[f"model.layers.{layer}.mlp.gate.weight"].T)
        for expert in range(E):
            for name in ("gate", "up", "down"):
                tensor = of[f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"]
                np.testing.assert_array_equal(params[f"expert_{name}"][layer, expert], tensor.T)
    parts = [part.size for place, part in read if place.rule.path[-1].startswith("expert")]
    cut = (sizes or {}).get("fsdp", 1) * (sizes or {}).get("tp", 1)
    assert set(parts) == {D * F // cut}
    copies = 8 // (cut * sizes["expert"]) if sizes else 1
    assert sum(parts) == 3 * L * E * D * F * copies, "each device reads its own experts, and no others"


def test_experts_are_written_as_they_were_read(tmp_path):
    of = of_experts(ml_dtypes.bfloat16)
    config, params = weights.load(write(tmp_path / "a", of, config=MOE))
    (tmp_path / "b").mkdir()
    safetensors_weights.save(tmp_path / "b", config, jax.tree.map(jnp.asarray, params), dtype="bfloat16")
    found = safetensors.numpy.load_file(tmp_path / "b" / "model.safetensors")
    assert found.keys() == of.keys()
    assert all(found[name].tobytes() == tensor.tobytes() for name, tensor in of.items())


@pytest.mark.parametrize("changes", [dict(num_experts=2**31 - 1), dict(num_hidden_layers=2**30)])
def test_sizes_that_lie_are_refused_at_once(changes, tmp_path):
    with pytest.raises(ValueError, match=r"num_layers is \d+ with num_experts \d+, the files have only"):
        weights.load(write(tmp_path, of_experts(), config={**MOE, **changes}))


@pytest.mark.parametrize("change, message", [(5, r"missing \(9\): model.layers.0.mlp.experts.4.gate_proj"), (3, r"unexpected \(9\): .*wrong shape")])
def test_another_number_of_experts_is_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        weights.load(write(tmp_path, of_experts(), config={**MOE, "num_experts": change}))


def test_peak_memory_is_the_largest_piece(tmp_path):
    """16 MB of embedding on eight devices are 2 MB each: beyond what stays, the file's slice, a copy of it and what looks for numbers that are not finite."""
    of = tensors()
    of["model.embed_tokens.weight"] = np.ones((2**19, D), np.float32)
    of["lm_head.weight"] = of["model.embed_tokens.weight"] / 2
    directory = write(tmp_path, of, config={**CONFIG, "vocab_size": 2**19})
    config = weights.read_config(directory)
    shardings = parallel.layout(safetensors_weights.parameter_shapes(config), parallel.make_mesh(jax.devices(), fsdp=8))
    tracemalloc.start()
    params = safetensors_weights.load(directory, config, shardings)
    held, peak = tracemalloc.get_traced_memory()  # a CPU device may keep the very array that it is given
    tracemalloc.stop()
    np.testing.assert_array_equal(params["embedding"], 1)
    assert peak - held <= 3.5 * 2**24 / 8


def test_what_is_written_is_what_was_read(tmp_path, monkeypatch):
    of = tensors(ml_dtypes.bfloat16)
    config, params = weights.load(write(tmp_path / "a", of))
    monkeypatch.setattr(safetensors_weights, "_SHARD_BYTES", 1000)
    (tmp_path / "b").mkdir()
    safetensors_weights.save(tmp_path / "b", config, jax.tree.map(jnp.asarray, params), dtype="bfloat16")
    (tmp_path / "b" / "config.json").write_text(json.dumps(CONFIG))
    files = safetensors_weights.shards(tmp_path / "b")
    assert len(files) > 3
    found = {name: tensor for file in files for name, tensor in safetensors.numpy.load_file(file).items()}
    assert found.keys() == of.keys()
    for name, tensor in of.items():
        assert found[name].dtype == ml_dtypes.bfloat16 and found[name].tobytes() == tensor.tobytes()
    jax.tree.map(np.testing.assert_array_equal, weights.load(tmp_path / "b")[1], params)


def test_a_tied_model_needs_no_head_and_ignores_one(tmp_path):
    for name, of in (("without", tensors(tied=True)), ("with", tensors())):
        of["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
        _, params = weights.load(write(tmp_path / name, of, config={**CONFIG, "tie_word_embeddings": True}))
        assert "head" not in params
        check(params, of)


def index(directory, **names):
    file = directory / "model.safetensors.index.json"
    values = json.loads(file.read_text())
    values["weight_map"] |= names
    file.write_text(json.dumps(values))


def test_missing_shards_are_listed(tmp_path):
    write(tmp_path, tensors(), files=4)
    for n in (2, 4):
        (tmp_path / f"model-0000{n}-of-00004.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 4 shards that .* names are missing: model-00002-of-00004.*, model-00004-of-00004.*; download"):
        weights.load(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        weights.load(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b.safetensors", "model.bin", "..", ""])
def test_an_index_opens_nothing_outside_its_directory(name, tmp_path):
    directory = write(tmp_path / "model", tensors(), files=2)
    safetensors.numpy.save_file(tensors(), tmp_path / "secret.safetensors")
    index(directory, **{"model.norm.weight": name})
    with pytest.raises(ValueError, match="a shard is a .safetensors file beside its index"):
        weights.load(directory)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": ["a"]}', "[" * 100000])
def test_damaged_indices_are_refused(text, tmp_path):
    write(tmp_path, tensors(), files=2)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="is not JSON|holds no weight_map"):
        weights.load(tmp_path)


def change(of, name, value):
    return {**of, name: value} if value is not None else {key: tensor for key, tensor in of.items() if key != name}


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("model.norm.weight", None, r"missing \(1\): model.norm.weight"),
        ("model.extra.weight", np.ones(3, np.float32), r"unexpected \(1\): model.extra.weight"),
        ("model.layers.1.mlp.up_proj.weight", np.ones((D, F), np.float32), r"up_proj.weight is \(8, 12\), must be \(12, 8\)"),
        ("model.layers.2.self_attn.k_proj.bias", np.ones((KV, DH), np.float32), r"k_proj.bias is \(2, 6\), must be \(12,\)"),
        ("model.norm.weight", np.ones(D, np.int64), "types that are not read: model.norm.weight is I64; use a file in float32, float16, bfloat16"),
        ("model.norm.weight", np.full(D, np.nan, np.float32), "tensor 'model.norm.weight' holds numbers that are not finite"),
        ("model.layers.2.mlp.down_proj.weight", np.full((D, F), np.inf, np.float32), "down_proj.weight' holds numbers that are not finite"),
    ],
)
def test_wrong_tensors_are_refused(name, value, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        weights.load(write(tmp_path, change(tensors(), name, value)))


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    of = tensors()
    write(tmp_path, of, files=2)
    file = tmp_path / "model-00001-of-00002.safetensors"
    safetensors.numpy.save_file({**safetensors.numpy.load_file(file), "model.norm.weight": of["model.norm.weight"]}, file)
    with pytest.raises(ValueError, match="'model.norm.weight' lies in two shards"):
        weights.load(tmp_path)


def header(path, change):
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    text = change(raw[8 : 8 + size].decode()).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"data_offsets":[0,', '"data_offsets":[4,', 1),
        lambda text: text.replace('"F32"', '"F99"', 1),
        lambda text: text.replace('"shape":[8]', '"shape":[4611686018427387904,8]', 1),
        lambda text: text.rstrip()[:-1],
        lambda text: "[" * 1000,
    ],
)
def test_hostile_headers_are_refused(damage, tmp_path):
    path = write(tmp_path, tensors()) / "model.safetensors"
    header(path, damage)
    with pytest.raises(ValueError, match="is damaged .*: download it again"):
        weights.load(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 8, 100, 5000])
def test_truncated_files_are_refused(size, tmp_path):
    path = write(tmp_path, tensors()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="is damaged"):
        weights.load(tmp_path)


SOUND = tensors()


@settings(max_examples=150, deadline=None)
@given(strategies.lists(strategies.tuples(strategies.integers(0, 2600), strategies.binary(min_size=1, max_size=3)), min_size=1, max_size=3))
def test_a_damaged_file_is_a_model_or_a_value_error(tmp_path_factory, changes):
    directory = tmp_path_factory.getbasetemp() / "fuzzed"
    raw = bytearray((write(directory, SOUND) / "model.safetensors").read_bytes())
    for place, new in changes:
        raw[place : place + len(new)] = new
    pathlib.Path(directory / "model.safetensors").write_bytes(raw)
    try:
        _, params = weights.load(directory)
    except ValueError:
        return
    assert params["embedding"].shape == (V, D)


def test_a_number_that_a_type_does_not_have_is_refused(tmp_path):
    config, params = weights.load(write(tmp_path / "model", tensors()))
    params["layers"]["up"][1, 2, 3] = 70000.0
    (tmp_path / "out").mkdir()
    for dtype in ("float32", "bfloat16"):
        safetensors_weights.save(tmp_path / "out", config, params, dtype=dtype)
    message = "tensor 'model.layers.1.mlp.up_proj.weight' reaches to 70000, the largest finite float16 is 65504: write it as float32, or bfloat16"
    with pytest.raises(ValueError, match=message):
        safetensors_weights.save(tmp_path / "out", config, params, dtype="float16")
    params["final_norm"][0] = np.nan
    with pytest.raises(ValueError, match="tensor 'model.norm.weight' reaches to nan"):
        safetensors_weights.save(tmp_path / "out", config, params)
