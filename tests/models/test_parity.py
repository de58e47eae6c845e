"""Every family against transformers, through its own files: a random model is saved by it, loaded by us, and compared; and back again."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgrpo_jax.generation import engine
from pgrpo_jax.generation.sampler import Support
from pgrpo_jax.models import families, hugging_face, hugging_face_files, hugging_face_tokenizer, safetensors_weights, transformer, weights
from pgrpo_jax.models import tokenizer as tokenizers
from pgrpo_jax.models.parameters import leaf

pytestmark = pytest.mark.parity
SIZES = dict(
    vocab_size=101, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=256, pad_token_id=None, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 500.0,
}  # fmt: skip
ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2000.0}, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}  # fmt: skip
CASES = {
    "llama": ("Llama", {}),
    "llama, tied, one key head, odd sizes": ("Llama", dict(hidden_size=45, num_attention_heads=5, num_key_value_heads=1, intermediate_size=33, tie_word_embeddings=True)),
    "llama, scaled rope": ("Llama", dict(rope_parameters=LLAMA_3, num_key_value_heads=6)),
    "qwen2": ("Qwen2", dict(rope_parameters={"rope_type": "default", "rope_theta": 1000.0})),
    "qwen2, tied, windows": ("Qwen2", dict(tie_word_embeddings=True, use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": ("Qwen3", {}),
    "qwen3, tied": ("Qwen3", dict(tie_word_embeddings=True, num_key_value_heads=3, head_dim=10)),
    "qwen3 moe": ("Qwen3Moe", dict(moe_intermediate_size=24, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True)),
    "qwen3 moe, tied, shares as they are, odd sizes": (
        "Qwen3Moe", dict(hidden_size=45, moe_intermediate_size=13, num_experts=7, num_experts_per_tok=3, tie_word_embeddings=True, head_dim=10),
    ),
    "qwen3 moe, every expert, windows": (
        "Qwen3Moe",
        dict(moe_intermediate_size=9, num_experts=3, num_experts_per_tok=3, norm_topk_prob=True, use_sliding_window=True, sliding_window=6),
    ),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", dict(sliding_window=6, query_pre_attn_scalar=12, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, num_hidden_layers=4)),
    "gemma3": ("Gemma3", dict(sliding_window=7, query_pre_attn_scalar=20, num_hidden_layers=7, rope_parameters=ROPES)),
}
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}  # PyTorch's fast matmul of experts takes multiples of 16 bytes only
TOKENS = 40  # of a text: longer than every window


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(their model in float32, the directory it saved)."""
    import torch
    import transformers

    name, changes = CASES[request.param]
    sizes = {**SIZES, **changes}
    if name == "Qwen2":  # which has width / heads
        del sizes["head_dim"]
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, **EAGER).eval()
    draw = torch.Generator().manual_seed(len(request.param))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            center = 1.0 if "norm" in parameter_name and "Gemma" not in name else 0.0
            parameter.copy_(center + 0.3 * torch.randn(parameter.shape, generator=draw))
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    return model, directory


def saved(name, tensor):
    """A parameter of theirs under the names that it is saved as: experts, which they hold together, one by one."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return [(name, tensor)]
    prefix, kind = name.rsplit(".", 1)
    parts = {"down_proj": tensor} if kind == "down_proj" else dict(zip(("gate_proj", "up_proj"), np.split(tensor, 2, axis=1)))
    return [(f"{prefix}.{expert}.{part}.weight", matrix[expert]) for part, matrix in parts.items() for expert in range(len(matrix))]


def ours(directory, dtype=jnp.float32):
    config, params = weights.load(directory)
    return transformer.Transformer(config, dtype=dtype), params


def text(model, rows=3):
    return np.random.default_rng(1).integers(0, model.config.vocab_size, (rows, TOKENS)).astype(np.int32)


def logits(model, params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    hidden, _ = transformer.forward(model, params, tokens, positions)
    return transformer.logits(params, hidden, model.config.logit_soft_cap)


def test_logits(pair):
    import torch

    theirs, directory = pair
    model, params = ours(directory)
    tokens = text(model)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    assert expected.std() > 0.3
    found = np.asarray(jax.jit(logits, static_argnums=0)(model, params, tokens))
    assert np.abs(found - expected).max() <= 1e-4
    half = np.asarray(jax.jit(logits, static_argnums=0)(transformer.Transformer(model.config, dtype=jnp.bfloat16), params, tokens))
    # each layer rounds some ten times on the way to the logits, by up to 2**-9 of the number each
    errors = np.sqrt((((half - expected) / np.abs(expected).max()) ** 2).mean(axis=-1))  # of each token
    # where a router was nearly undecided the rounded token takes another expert, and those that attend to it see another token
    error = np.median(errors) if 1 < model.config.num_experts > model.config.experts_per_token else np.sqrt((errors**2).mean())
    assert 0 < error <= 2**-9 * np.sqrt(12 * model.config.num_layers) * 2


def test_gradients(pair):
    """Of the mean log-prob of a text, every parameter of every layer."""
    import torch

    theirs, directory = pair
    model, params = ours(directory)
    tokens = text(model)
    theirs.zero_grad()
    scores = torch.log_softmax(theirs(torch.tensor(tokens, dtype=torch.long)).logits, dim=-1)[:, :-1]
    torch.gather(scores, 2, torch.tensor(tokens[:, 1:, None], dtype=torch.long)).mean().backward()
    expected = {part: gradient for name, parameter in theirs.named_parameters() for part, gradient in saved(name, parameter.grad.numpy())}

    def mean(params):
        scores = jax.nn.log_softmax(logits(model, params, tokens)[:, :-1], axis=-1)
        return jnp.mean(jnp.take_along_axis(scores, jnp.asarray(tokens[:, 1:, None]), axis=-1))

    found = jax.jit(jax.grad(mean))(params)
    places = families.placements(families.hugging_face_rules(model.config), model.config)
    assert places.keys() == expected.keys() - {"lm_head.weight"} | ({"lm_head.weight"} & places.keys())
    for name, place in places.items():
        gradient = families.from_parameter(np.asarray(leaf(found, place.rule.path)[place.row]), place)
        assert np.abs(expected[name]).max() > 0
        assert np.linalg.norm(gradient - expected[name]) <= 1e-3 * np.linalg.norm(expected[name]), name


@pytest.fixture(scope="module")
def continued(pair):
    """(prompts of several lengths, the 32 tokens that their model says after each, every one computed from the whole text)."""
    import torch

    theirs, directory = pair
    begin = text(ours(directory)[0], 1)[0, :33].tolist()
    prompts = [begin, begin + [5, 6, 7], begin + [9]]
    answers = []
    for prompt in prompts:
        row = torch.tensor([prompt], dtype=torch.long)
        answer = theirs.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=32, do_sample=False, use_cache=False)
        answers.append(answer[0, len(prompt) :].tolist())
    return prompts, answers


@pytest.mark.parametrize("slots", [0, 2])
def test_greedy_answers(pair, continued, slots):
    """Through the caches: of prompts, of what they begin with, and of completions."""
    model, params = ours(pair[1])
    prompts, answers = continued
    what = engine.GenerationSettings(max_new_tokens=32, support=Support(top_k=1), stop_ids=(), pad_id=0, prompt_buckets=(40,), slots=slots)
    padded, lengths = engine.pad_prompts(prompts, buckets=what.prompt_buckets, pad_id=0)
    found = engine.generate(model, params, padded, lengths, jax.random.key(0), completions_per_prompt=1, settings=what).tokens
    assert found.tolist() == answers


def test_a_directory_comes_back_bit_for_bit(pair, tmp_path):
    import safetensors.numpy
    import torch
    import transformers

    theirs, directory = pair
    model, params = ours(directory)
    safetensors_weights.save(tmp_path, model.config, params)
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    before, after = (safetensors.numpy.load_file(each / "model.safetensors") for each in (directory, tmp_path))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor, after[name], strict=True)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **EAGER).eval()
    tokens = torch.tensor(text(model), dtype=torch.long)
    with torch.no_grad():
        assert torch.equal(back(tokens).logits, theirs(tokens).logits)


def test_configurations_of_before_transformers_5_are_read(pair):
    """The same model, its rotary embedding spelled as the files on the hub spell it."""
    _, directory = pair
    values = json.loads((directory / "config.json").read_text())
    expected = weights.read_config(directory)
    rope = values.pop("rope_parameters")
    if "full_attention" in rope:
        values |= {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"]}
        rope = rope["full_attention"]
    values["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] != "default":
        values["rope_scaling"] = rope
    assert hugging_face.to_model_config(values) == expected
    assert dataclasses.asdict(expected)["rope_theta"] == values["rope_theta"]


def test_a_configuration_that_is_written_is_their_model(pair, tmp_path):
    """Without their config.json: the logits of our configuration, read by them, to the bit."""
    import torch
    import transformers

    theirs, directory = pair
    model, params = ours(directory)
    safetensors_weights.save(tmp_path, model.config, params)
    (tmp_path / "config.json").write_text(json.dumps(hugging_face.from_model_config(model.config)))
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **EAGER).eval()
    assert type(back) is type(theirs)
    tokens = torch.tensor(text(model), dtype=torch.long)
    with torch.no_grad():
        assert torch.equal(back(tokens).logits, theirs(tokens).logits)


TEXTS = [
    "The capital of France is", "Grüße, 世界! 👩‍👩‍👧 ½ ١٢٣ e\u0301 \u202e", "def f(x):\n    return {'a': [x ** 2, 0x1F]}  # why?\n", "2026-11-22 3.14159 1e-5 007",
    "it's we'll I'M", "", " ", "\n\n\t  x", "a" * 300, "<tool> <|im_end", "user\nassistant",
]  # fmt: skip


def test_tokenizer(tmp_path):
    """Ids and chats of a byte-level tokenizer equal those of transformers."""
    import transformers

    from tests.models.test_hugging_face_tokenizer import write

    write(tmp_path)
    theirs, found = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path), hugging_face_tokenizer.load(tmp_path)
    for text in TEXTS:
        assert found.encode(text) == theirs.encode(text, add_special_tokens=False)
        chat = theirs.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        assert found.render_chat(text) == theirs.encode(chat, add_special_tokens=False)


CHATS = ["Hi there!", "  user\n", "Grüße, 世界! 👩‍👩‍👧 ½", "2026-11-22 3.14", "a\x04b", "it's we'll", "im_end|>"]


@pytest.mark.parametrize("source", ["smollm2", "bytes"])
def test_a_tokenizer_that_is_written(source, tmp_path):
    """Of a GGUF file, and the byte tokenizer: ids, chats and texts in transformers and back in here."""
    import transformers

    given = tokenizers.ByteTokenizer() if source == "bytes" else tokenizers.load(".assets/smollm2-135m")
    config = weights.read_config(".assets/smollm2-135m")
    hugging_face_files.write(tmp_path, dataclasses.replace(config, vocab_size=given.vocab_size), given, dtype="float32")
    hugging_face_files.write_generation_config(tmp_path, given, temperature=0.7, top_k=5, top_p=0.9)
    theirs, back = transformers.AutoTokenizer.from_pretrained(tmp_path), hugging_face_tokenizer.load(tmp_path)
    assert len(theirs) == given.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (given.bos_id, given.eos_id, given.pad_id)
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id", "stop_ids"):
        assert getattr(back, name) == getattr(given, name)
    for text in TEXTS + CHATS:
        assert theirs.encode(text, add_special_tokens=False) == back.encode(text) == given.encode(text)
        assert theirs.decode(given.encode(text)) == back.decode(given.encode(text)) == given.decode(given.encode(text))
    for text in CHATS:
        chat = [{"role": "user", "content": text}]
        found = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert found == back.render_chat(text) == given.render_chat(text)
    ids = np.random.default_rng(0).integers(0, given.vocab_size, 500).tolist()  # broken UTF-8, control tokens
    assert theirs.decode(ids, skip_special_tokens=True) == back.decode(ids) == given.decode(ids)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (generation.do_sample, generation.temperature, generation.top_k, generation.top_p) == (True, 0.7, 5, 0.9)
    assert (generation.eos_token_id, generation.pad_token_id) == (list(given.stop_ids), given.pad_id)
