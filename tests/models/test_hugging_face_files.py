"""What stands beside the tensors of a Hugging Face directory: JSON read by hand, and back through our own readers (transformers: test_parity.py)."""

import json

import pytest
import tokenizers

from pgrpo_jax.models import gguf_tokenizer, hugging_face_files, hugging_face_tokenizer
from pgrpo_jax.models.config import ModelConfig
from pgrpo_jax.models.gguf_vocabulary import BYTE, CONTROL, NORMAL, USER_DEFINED, Vocabulary
from pgrpo_jax.models.tokenizer import ByteTokenizer
from tests.models.test_hugging_face_tokenizer import write as write_tokenizer

SIZES = dict(num_layers=1, width=8, mlp_width=8, num_heads=2, num_kv_heads=1, head_dim=4, context_length=32, rope_theta=1e4, norm_epsilon=1e-5)
TEMPLATE = "{% for m in messages %}{{ '<s>' + m['content'] + '<e>' }}{% endfor %}"


def values(directory, name):
    return json.loads((directory / name).read_text())


def config(vocab_size):
    return ModelConfig(**SIZES, vocab_size=vocab_size, tied_embeddings=True)


def small(**changes):
    """Control tokens at both ends of the vocabulary, and one in the middle."""
    tokens = ["<e>", "a", "b", "<s>", "ab", "Ġ", "1", "<p>", "<", "e", ">"]
    kinds = [CONTROL if token in (0, 3, 7) else NORMAL for token in range(len(tokens))]
    vocabulary = Vocabulary(tokens, kinds, changes.pop("special_ids", {"eos": 0, "bos": 3, "unknown": 7, "eot": 7}))
    arguments = dict(merges=[("a", "b")], pre_tokenizer="smollm", chat_template=TEMPLATE)
    return gguf_tokenizer.byte_level_bpe(vocabulary, **{**arguments, **changes})


@pytest.mark.parametrize("space_prefix", [True, False])
def test_a_sentencepiece_tokenizer_is_written_as_it_encodes(space_prefix, tmp_path):
    """User-defined tokens stay whole, a prefix stays a prefix, bytes stand for what has no token; a base model has no template to write."""
    table = [("<s>", CONTROL, 0.0), ("</s>", CONTROL, 0.0), ("\u2581", NORMAL, -3.0), ("a", NORMAL, -4.0), ("b", NORMAL, -5.0), ("ab", NORMAL, -1.0)]
    table += [("\u2581ab", NORMAL, -0.5), ("\n\n", NORMAL if space_prefix else USER_DEFINED, 0.0)] + [(f"<0x{byte:02X}>", BYTE, 0.0) for byte in range(256)]
    tokens, kinds, scores = zip(*table)
    given = gguf_tokenizer.sentencepiece_bpe(
        Vocabulary(tokens, kinds, {"bos": 0, "eos": 1}), scores=scores, space_prefix=space_prefix, chat_template=None
    )
    hugging_face_files.write(tmp_path, config(given.vocab_size), given, dtype="float32")
    written = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("ab", "ab ab", " a\n\nb", "é", "ab\n\n\nab"):
        ids = given.encode(text)
        assert written.encode(text, add_special_tokens=False).ids == ids, text
        assert written.decode(ids) == given.decode(ids) == text
    assert (given.encode("ab") == [6]) == space_prefix and written.token_to_id("</s>") == 1
    assert "chat_template" not in values(tmp_path, "tokenizer_config.json")


def test_a_prefix_beside_user_defined_tokens_is_refused(tmp_path):
    table = [("</s>", CONTROL, 0.0), ("\u2581", NORMAL, -3.0), ("\n\n", USER_DEFINED, 0.0)] + [(f"<0x{byte:02X}>", BYTE, 0.0) for byte in range(256)]
    tokens, kinds, scores = zip(*table)
    given = gguf_tokenizer.sentencepiece_bpe(Vocabulary(tokens, kinds, {"eos": 0}), scores=scores, space_prefix=True, chat_template=None)
    with pytest.raises(ValueError, match="^a tokenizer that puts ' ' before every text and has user-defined tokens can not be written"):
        hugging_face_files.write(tmp_path, config(given.vocab_size), given, dtype="float32")


def test_control_tokens_keep_their_ids_and_become_special(tmp_path):
    given = small()
    hugging_face_files.write(tmp_path, config(given.vocab_size), given, dtype="bfloat16")
    file = values(tmp_path, "tokenizer.json")
    assert [(token["id"], token["content"], token["special"]) for token in file["added_tokens"]] == [(0, "<e>", True), (3, "<s>", True), (7, "<p>", True)]
    assert sorted(file["model"]["vocab"].values()) == list(range(11)) and file["model"]["merges"] == [["a", "b"]]
    read = tokenizers.Tokenizer.from_str(json.dumps(file))
    assert read.encode("<s>ab 11<e><p>").ids == [3, 4, 5, 6, 6, 0, 7]
    assert given.encode("<s>") != [3]  # in here a text can not place it, and there it is asked not to
    read.encode_special_tokens = True
    assert read.encode("a<e>").ids == [1, 8, 9, 10]


def test_names_ends_and_sizes(tmp_path):
    given = small()
    hugging_face_files.write(tmp_path, config(given.vocab_size), given, dtype="bfloat16")
    hugging_face_files.write_generation_config(tmp_path, given, temperature=0.5, top_k=7, top_p=0.25)
    assert values(tmp_path, "tokenizer_config.json") == {
        "bos_token": "<s>", "eos_token": "<e>", "pad_token": "<e>", "unk_token": "<p>", "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False, "model_max_length": 32, "chat_template": TEMPLATE,
    }  # fmt: skip
    assert values(tmp_path, "generation_config.json") == {
        "bos_token_id": 3, "eos_token_id": [0, 7], "pad_token_id": 0, "do_sample": True, "temperature": 0.5, "top_k": 7, "top_p": 0.25,
    }  # fmt: skip
    found = values(tmp_path, "config.json")
    assert (found["torch_dtype"], found["vocab_size"], found["bos_token_id"], found["eos_token_id"], found["pad_token_id"]) == ("bfloat16", 11, 3, 0, None)
    back = hugging_face_tokenizer.load(tmp_path)
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id", "stop_ids"):
        assert getattr(back, name) == getattr(given, name)
    for text in ("ab", "a<e>b <s>", "1 1"):
        assert back.render_chat(text) == given.render_chat(text) == [3, *given.encode(text), 0]


def test_a_model_without_a_first_token(tmp_path):
    given = small(special_ids={"eos": 4})  # and one whose answers end in a token that is no control token
    hugging_face_files.write(tmp_path, config(given.vocab_size), given, dtype="float32")
    hugging_face_files.write_generation_config(tmp_path, given, temperature=1.0, top_k=0, top_p=1.0)
    found = values(tmp_path, "tokenizer_config.json")
    assert "bos_token" not in found and (found["eos_token"], found["pad_token"]) == ("ab", "ab")
    assert values(tmp_path, "config.json")["bos_token_id"] is None and "bos_token_id" not in values(tmp_path, "generation_config.json")
    assert hugging_face_tokenizer.load(tmp_path).bos_id is None


def test_bytes(tmp_path):
    """Against Python's own UTF-8, every byte and broken sequences too."""
    given = ByteTokenizer()
    hugging_face_files.write(tmp_path, config(259), given, dtype="float32")
    back = hugging_face_tokenizer.load(tmp_path)
    for text in ("", " ", "user 3 likes: a\n", "Grüße 世界 👩‍👩‍👧", "\x00\x7f<|bos|><|eos|>", "".join(map(chr, range(0x20, 0x2FF)))):
        assert back.encode(text) == list(text.encode()) and back.decode(back.encode(text)) == text
        assert back.render_chat(text) == [256, *text.encode(), 10]
    for broken in (bytes(range(256)), b"\xf0\x9f\x91 \xe4\xb8 \xed\xa0\x80 \xc0\x80", b"\xff" * 5):
        assert back.decode([257, *broken, 258]) == broken.decode("utf-8", errors="replace")


@pytest.mark.parametrize("keys, expected", [({}, {"torch_dtype"}), ({"dtype": "float16"}, {"dtype"}), ({"torch_dtype": None, "dtype": "x"}, {"torch_dtype", "dtype"})])
def test_a_directory_is_copied_and_the_type_named(keys, expected, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    write_tokenizer(source, config={"architectures": ["LlamaForCausalLM"], "unknown_key": [1, None], **keys}, template=None)
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}\n")
    (source / "vocab.json").symlink_to(source / "tokenizer.json")  # as in the cache of a download
    for other in ("model.safetensors", "generation_config.json", "README.md"):
        (source / other).write_text("not copied")
    hugging_face_files.copy(source, target, dtype="bfloat16")
    copied = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json"}
    assert {file.name for file in target.iterdir()} == copied | {"config.json"} and not (target / "vocab.json").is_symlink()
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in copied)
    assert values(target, "config.json") == values(source, "config.json") | dict.fromkeys(expected, "bfloat16")
