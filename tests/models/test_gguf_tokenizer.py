"""Tokenizers of GGUF files on small vocabularies made by hand: against SentencePiece's algorithm written out here, and against files that mean harm."""

import gguf
import numpy as np
import pytest

from pgrpo_jax.models import gguf_tokenizer, tokenizer
from pgrpo_jax.models.gguf_vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Vocabulary

SPACE = "\u2581"
CONTROLS = [("<pad>", CONTROL, 0.0), ("<eos>", CONTROL, 0.0), ("<bos>", CONTROL, 0.0), ("<unk>", UNKNOWN, 0.0), ("[PAD4]", UNUSED, 0.0)]
BYTES = [(f"<0x{byte:02X}>", BYTE, 0.0) for byte in range(256)]
WHOLE = [("<tag>", USER_DEFINED, 0.0), ("\n", USER_DEFINED, 0.0), ("\n\n", USER_DEFINED, 0.0), ("  ", USER_DEFINED, 0.0), ("   ", USER_DEFINED, 0.0)]
# "the" by way of "th" has the better score, by way of "he" the lower id
WORDS = {"he": -9.0, "th": -1.0, "the": -2.0, f"{SPACE}t": -8.0, f"{SPACE}the": -3.0, "en": -4.0, "then": -7.0, "hen": -6.0}
LETTERS = {letter: -50.0 - number for number, letter in enumerate(f"then{SPACE}<ag>é")}
SPECIAL = {"eos": 1, "bos": 2, "pad": 0, "unknown": 3}
TEMPLATE = "<bos>{% for m in messages %}{{ m['content'] + '<eos>' }}{% endfor %}"


def rows(words=WORDS):
    return [*CONTROLS, *BYTES, *WHOLE, *((text, NORMAL, score) for text, score in (words | LETTERS).items())]


def small(table, *, space_prefix=False, template=TEMPLATE, **changes):
    tokens, kinds, scores = zip(*table)
    return gguf_tokenizer.sentencepiece_bpe(
        Vocabulary(tokens, kinds, changes.pop("special_ids", SPECIAL)), scores=changes.pop("scores", scores), space_prefix=space_prefix, chat_template=template
    )


def spelled(table, ids):
    return [table[token][0] for token in ids]


def by_hand(table, text, *, space_prefix=False):
    """SentencePiece: user-defined tokens first, the longest at each place; then, again and again, the leftmost of the best-scored sums of neighbours."""
    ids = {piece: token for token, (piece, kind, _) in enumerate(table) if kind in (NORMAL, USER_DEFINED)}
    scores = {piece: score for piece, kind, score in table if kind == NORMAL}
    whole = sorted((piece for piece, kind, _ in table if kind == USER_DEFINED), key=len, reverse=True)
    rest, runs = (" " + text if space_prefix and text else text).replace(" ", SPACE), [[]]
    while rest:
        found = next((piece for piece in whole if rest.startswith(piece.replace(" ", SPACE))), None)
        runs += [found, []] if found else []
        runs[-1] += [] if found else [rest[0]]
        rest = rest[len(found) if found else 1 :]
    answer = []
    for run in runs:
        if isinstance(run, str):
            answer.append(ids[run])
            continue
        while sums := [(scores[a + b], -at) for at, (a, b) in enumerate(zip(run, run[1:])) if a + b in scores and a in scores and b in scores]:
            at = -max(sums)[1]
            run[at : at + 2] = [run[at] + run[at + 1]]
        for piece in run:
            answer += [ids[piece]] if piece in scores else [5 + byte for byte in piece.encode()]
    return answer


def test_neighbours_merge_in_the_order_of_their_scores():
    table = rows()
    assert spelled(table, small(table).encode("then the hen")) == ["then", f"{SPACE}the", SPACE, "hen"]
    for scores, expected in (({"he": -9.0, "th": -1.0}, ["th", "e"]), ({"he": -0.5, "th": -1.0}, ["t", "he"])):  # the ids are the same
        other = rows(scores)
        assert spelled(other, small(other).encode("the")) == expected
    assert spelled(other, small(other).encode("thhe")) == ["th", "he"]


def test_characters_without_a_token_become_bytes_and_come_back():
    table = rows()
    found = small(table)
    text = "thé 世 🤽"
    assert spelled(table, found.encode(text))[:6] == ["th", "é", SPACE, "<0xE4>", "<0xB8>", "<0x96>"]
    assert found.decode(found.encode(text)) == text
    assert found.decode(found.encode("世")[:2]) in ("\ufffd", "\ufffd\ufffd")
    assert found.decode(found.encode("<0xE4>")) == "<0xE4>" and len(found.encode("<0xE4>")) > 1


def test_user_defined_tokens_are_found_first_and_whole():
    table = rows()
    found = small(table)
    assert spelled(table, found.encode("th<tag>en")) == ["th", "<tag>", "en"]
    assert spelled(table, found.encode("\n\n\nthe")) == ["\n\n", "\n", "the"]
    assert spelled(table, found.encode("th     the")) == ["th", "   ", "  ", "the"]  # the last space merges with nothing
    assert found.decode(found.encode("th     the\n<tag>")) == "th     the\n<tag>"


@pytest.mark.parametrize("text", ["<eos>", "<bos><unk>", "[PAD4]", "the<eos>\n<bos>the"])
def test_no_text_becomes_a_token_that_is_not_for_texts(text):
    found = small(rows())
    assert min(found.encode(text)) > 4 and found.decode(found.encode(text)) == text
    assert found.decode([0, 1, 2, 3, 4]) == ""
    assert [token for token in found.render_chat(text) if token <= 4] == [2, 1]


def test_user_defined_spaces_are_found_however_a_file_spells_them():
    table = [(text.replace(" ", SPACE) if kind == USER_DEFINED else text, kind, score) for text, kind, score in rows()]
    assert small(table).encode("th     the  ") == small(rows()).encode("th     the  ")
    assert small(table).decode(small(table).encode("th     the  ")) == "th     the  "


def test_a_template_may_place_a_token_that_was_not_used_so_far():
    table = rows()
    found = small(table, template="<bos>[PAD4]{{ messages[0]['content'] }}")
    assert spelled(table, found.render_chat("then")) == ["<bos>", "[PAD4]", "then"]


def test_space_before_the_first_word():
    table = rows()
    found = small(table, space_prefix=True)
    assert spelled(table, found.encode("the the")) == [f"{SPACE}the", f"{SPACE}the"]
    assert spelled(table, found.encode(" the")) == ["  ", "the"]
    assert found.encode("") == []
    for text in ("", " ", "the", " the ", "   the", "\n the"):
        assert found.decode(found.encode(text)) == text


@pytest.mark.parametrize("space_prefix", [False, True])
def test_random_vocabularies_and_texts(space_prefix):
    rng = np.random.default_rng(5)
    for _ in range(200):
        words = {"".join(rng.choice(list(f"the{SPACE}"), rng.integers(2, 6))): 0.0 for _ in range(30)}
        table = rows({word: float(score) for word, score in zip(words, rng.permutation(30))})
        found = small(table, space_prefix=space_prefix)
        for _ in range(10):
            text = "".join(rng.choice(["t", "h", "e", " ", "\n", "<tag>", "é", "世"], rng.integers(1, 40), p=[0.25, 0.25, 0.2, 0.2, 0.02, 0.02, 0.03, 0.03]))
            assert found.encode(text) == by_hand(table, text, space_prefix=space_prefix), (text, words)
            assert found.decode(found.encode(text)) == text


def test_a_base_model_encodes_and_decodes_but_has_no_chat():
    found = small(rows(), template=None)
    assert found.decode(found.encode("then")) == "then"
    with pytest.raises(ValueError, match="a base model, its files hold no chat template: choose its instruction-tuned version"):
        found.render_chat("then")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scores": [0.0] * 9}, "tokens have 9 scores, each must have one"),
        ({"scores": [float("nan")] * len(rows())}, "and a finite one"),
        ({"table": [row for row in rows() if row[0] != "<0x1F>"]}, r"255 byte tokens, must be <0x00> to <0xFF> \(absent: <0x1F>\)"),
        ({"table": [*rows(), ("<0x100>", BYTE, 0.0)]}, r"257 byte tokens.*\(absent: none\)"),
        ({"table": [*rows(), ("x", 7, 0.0)]}, r"token types, among them \[1, 2, 3, 4, 5, 6, 7\], each must be one of 1 \(normal\), 2 \(unknown\)"),
        ({"table": [*rows(), ("the", USER_DEFINED, 0.0)]}, "distinct texts, all must differ"),
        ({"table": [*rows(), ("the" * 171, NORMAL, 0.0)]}, "a token has 513 letters, at most 512"),
        ({"special_ids": {"bos": 2}}, "there is no eos token"),
        ({"special_ids": {"eos": -1}}, r"eos token is -1, must be an id in \[0, "),
    ],
)
def test_contradictory_vocabularies_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(changes.pop("table", rows()), **changes)


def write(path, table, *, model="llama", architecture="gemma3", special_ids=SPECIAL, **more):
    """Writes a file that holds a tokenizer alone; `more` are further keys of "tokenizer.ggml.", None = left out."""
    tokens, kinds, scores = zip(*table)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    values = {"token_type": [int(kind) for kind in kinds], "scores": [float(score) for score in scores]} | more
    names = {"unknown": "unknown", "pad": "padding"}
    values |= {f"{names.get(name, name)}_token_id": token for name, token in special_ids.items()}
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(f"tokenizer.ggml.{key}", value)
        elif value is not None:
            {int: writer.add_uint32, str: writer.add_string, bool: writer.add_bool}[type(value)](f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_a_file_says_whether_a_space_goes_first(tmp_path):
    for flag, expected in ((None, [f"{SPACE}the"]), (True, [f"{SPACE}the"]), (False, ["the"])):
        found = tokenizer.load(write(tmp_path / "m.gguf", rows(), add_space_prefix=flag))
        assert spelled(rows(), found.encode("the")) == expected and found.decode(found.encode("the")) == "the"
    assert (found.vocab_size, found.bos_id, found.eos_id, found.pad_id, found.stop_ids) == (len(rows()), 2, 1, 0, (1,))


def test_what_ends_a_turn_is_control_whatever_a_file_calls_it(tmp_path):
    table = [*rows(), ("<end_of_turn>", USER_DEFINED, 0.0)]
    found = tokenizer.load(write(tmp_path / "m.gguf", table, special_ids=SPECIAL | {"eot": len(table) - 1}))
    assert found.stop_ids == (1, len(table) - 1)
    assert len(found.encode("<end_of_turn>")) > 1 and found.decode([len(table) - 1]) == ""


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "t5"}, "model is 't5', known are 'gpt2' .* and 'llama'"),
        ({"scores": None}, r"scores \(a list of numbers\) are missing"),
        ({"scores": ["a"] * len(rows())}, r"scores \(a list of numbers\) are missing"),
        ({"scores": [0.0]}, "tokens have 1 scores"),
        ({"token_type": None}, "tokens have 0 token types"),
        ({"token_type": [1] * 3}, "tokens have 3 token types"),
        ({"add_space_prefix": 1}, "add_space_prefix is 1, must be True or False"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is True"),
        ({"model": "gpt2"}, r"merges \(a list of texts\) are missing"),
        ({"model": "gpt2", "merges": ["a b c"]}, "merge 'a b c' must be two tokens"),
        ({"model": "gpt2", "merges": ["t h"], "pre": "tekken"}, "pre-tokenizer is 'tekken', known are llama-bpe, qwen2, smollm"),
    ],
)
def test_files_that_contradict_themselves_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=rf"tokenizer of .*m.gguf: .*{message}"):
        tokenizer.load(write(tmp_path / "m.gguf", rows(), **changes))


def test_random_damage_is_refused_or_leaves_a_tokenizer(tmp_path):
    path, rng, loaded = write(tmp_path / "m.gguf", rows()), np.random.default_rng(7), 0
    content = path.read_bytes()
    for _ in range(400):
        damaged = bytearray(content)
        for position in rng.integers(0, len(content), rng.integers(1, 4)):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            found = tokenizer.load(path)
            found.decode(found.encode("then the\n<tag>"))
            loaded += 1
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
    assert 0 < loaded < 400


def byte_level(pre_tokenizer, *more):
    """(tokenizer, its tokens): all bytes, pairs of digits and of letters, and a word that no merges lead to."""
    alphabet = sorted(map(chr, [*range(33, 127), *range(161, 173), *range(174, 324)]))  # GPT-2's letters of the 256 bytes
    assert len(alphabet) == 256
    merges = [("1", "2"), ("12", "3"), ("123", "4"), ("a", "b"), ("Ġ", "a"), ("'", "L"), ("'L", "L"), ("Ċ", "Ċ"), ("Ġ", "Ġ"), ("ab", "'"), ("?", "Ċ")]
    table = [("<e>", CONTROL), *((text, NORMAL) for text in [*alphabet, *("".join(pair) for pair in merges), "Ġwhole"]), *more]
    tokens, kinds = zip(*table)
    vocabulary = Vocabulary(tokens, kinds, {"eos": 0})
    return gguf_tokenizer.byte_level_bpe(vocabulary, merges=merges, pre_tokenizer=pre_tokenizer, chat_template=None), tokens


@pytest.mark.parametrize(
    "text, smollm, qwen2, llama",
    [
        ("1234", "1 2 3 4", "1 2 3 4", "123 4"),
        ("ab'LL", "ab ' L L", "ab 'LL", "ab 'LL"),
        (" whole", "Ġ w h o l e", "Ġ w h o l e", "Ġwhole"),
        ("  ab", "Ġ Ġ ab", "Ġ Ġ ab", "Ġ Ġ ab"),
        ("(ab", "( ab", "( ab", "( ab"),
        ("?\nab", "? Ċ ab", "?Ċ ab", "?Ċ ab"),
        ("\n\nab", "Ċ Ċ ab", "ĊĊ ab", "ĊĊ ab"),
        ("e\u0301", "e Ì ģ", "Ã ©", "e Ì ģ"),
    ],
)
def test_cuts(text, smollm, qwen2, llama):
    for name, expected in (("smollm", smollm), ("qwen2", qwen2), ("llama-bpe", llama)):
        found, tokens = byte_level(name)
        assert [tokens[token] for token in found.encode(text)] == expected.split(" "), name


def test_byte_level_tokens_that_stay_whole_and_tokens_without_use():
    found, tokens = byte_level("qwen2", ("<tool call>", USER_DEFINED), ("[PAD9]", UNUSED), ("<｜x▁y｜>", USER_DEFINED))
    text = "ab<tool call>ab <｜x▁y｜>[PAD9]"
    assert [tokens[token] for token in found.encode(text)][:5] == ["ab", "<tool call>", "ab", "Ġ", "<｜x▁y｜>"]
    assert found.decode(found.encode(text)) == text and tokens.index("[PAD9]") not in found.encode(text)
    assert found.decode([tokens.index("[PAD9]")]) == ""
    with pytest.raises(ValueError, match="user-defined token '<é>' would be decoded as bytes"):
        byte_level("qwen2", ("<é>", USER_DEFINED))
