"""Encoders of plain text by byte-pair encoding, of the two kinds that GGUF files carry: over bytes with a list of merges, and SentencePiece's over
characters with a score for each token. Neither has a control token in its vocabulary, so that no text can be encoded as one."""

import math
from typing import Any, Mapping, NamedTuple, Sequence

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from pgrpo_jax.models.gguf_vocabulary import BYTE, NORMAL, USER_DEFINED, Vocabulary

_SPACE = "\u2581"  # how SentencePiece spells a space
_MOST_LETTERS = 512  # of a token with a score, of which every cut is looked at
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_BYTE_LEVEL = frozenset(pre_tokenizers.ByteLevel.alphabet())


class PreTokenizer(NamedTuple):
    """What is done to a text before its bytes are merged.

    Attributes:
        cuts: in turn; no merge spans a cut.
        normalizer: None = the text stays as it is.
        whole_first: what lies between two cuts and is a token is that token, whatever the merges would make of it.
    """

    cuts: tuple[Any, ...]
    normalizer: Any = None
    whole_first: bool = False


def _pattern(numbers: str) -> tuple[Any, ...]:
    """Cuts by the regular expression that Llama 3 (github.com/meta-llama/llama3) and Qwen 2 share, but for how many digits stand together."""
    alternatives = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+", numbers, r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
    )  # fmt: skip
    return pre_tokenizers.Split(tokenizers.Regex("|".join(alternatives)), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


# llama.cpp's names. Qwen's and Llama 3's own tokenizers normalise and take whole tokens first; of that a GGUF file says nothing.
PRE_TOKENIZERS = {
    "smollm": PreTokenizer((pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))),
    "qwen2": PreTokenizer(_pattern(r"\p{N}"), normalizers.NFC()),
    "llama-bpe": PreTokenizer(_pattern(r"\p{N}{1,3}"), whole_first=True),
}


def byte_level(vocabulary: Vocabulary, *, merges: Sequence[tuple[str, str]], pre_tokenizer: str) -> tokenizers.Tokenizer:
    """Returns a byte-level encoder.

    Bytes that the vocabulary has no token for are left out, as the models' own tokenizers do (SmolLM2: six control
    characters, and the first byte of planes that Unicode has not assigned).

    Args:
        vocabulary: normal tokens in the byte-level alphabet.
        merges: pairs of tokens, the first merge first.
        pre_tokenizer: of `PRE_TOKENIZERS`.

    Raises:
        ValueError: an argument contradicts another, or the pre-tokenizer is not known.
    """
    if pre_tokenizer not in PRE_TOKENIZERS:
        raise ValueError(f"pre-tokenizer is {pre_tokenizer!r}, known are {', '.join(sorted(PRE_TOKENIZERS))}: choose such a model")
    normal, whole = vocabulary.of(NORMAL, BYTE), vocabulary.of(USER_DEFINED)
    for left, right in merges:
        if not (left in normal and right in normal and left + right in normal):
            raise ValueError(f"merge {left!r} + {right!r} needs both and their sum among the normal tokens: the file is damaged")
    if wrong := [text for text in whole if not text.isascii() and _BYTE_LEVEL.issuperset(text)]:
        raise ValueError(f"user-defined token {wrong[0]!r} would be decoded as bytes: only tokens of ASCII letters, or with a letter beyond bytes, are read")
    how = PRE_TOKENIZERS[pre_tokenizer]
    encoder = tokenizers.Tokenizer(models.BPE(vocab=normal | whole, merges=list(merges), ignore_merges=how.whole_first))
    if how.normalizer is not None:
        encoder.normalizer = how.normalizer
    encoder.pre_tokenizer = pre_tokenizers.Sequence(list(how.cuts))
    encoder.decoder = decoders.ByteLevel()
    encoder.add_tokens([tokenizers.AddedToken(text, normalized=False, special=False) for text in whole])
    return encoder


def sentencepiece(vocabulary: Vocabulary, *, scores: Sequence[float], space_prefix: bool) -> tokenizers.Tokenizer:
    """Returns an encoder as SentencePiece's byte-pair encoding (Kudo & Richardson 2018, arXiv:1808.06226).

    Of the neighbours whose sum is a normal token, those are merged first whose sum has the highest score; a character that is in no token becomes its
    bytes; user-defined tokens are found first, the longest at each place, and merge with nothing.

    Args:
        vocabulary: normal tokens spell a space as U+2581, user-defined ones as it is.
        scores: V, by id.
        space_prefix: the space that the caller puts before a text is taken off again in decoding.

    Raises:
        ValueError: the scores are not those of the vocabulary, a token is too long, or a byte has no token.
    """
    if len(scores) != len(vocabulary.tokens) or not all(map(math.isfinite, scores)):
        raise ValueError(f"{len(vocabulary.tokens)} tokens have {len(scores)} scores, each must have one, and a finite one: the file is damaged")
    normal, whole, single = (vocabulary.of(kind) for kind in (NORMAL, USER_DEFINED, BYTE))
    if single.keys() != set(_BYTES):
        absent = next((name for name in _BYTES if name not in single), "none")
        raise ValueError(f"{len(single)} byte tokens, must be {_BYTES[0]} to {_BYTES[-1]} (absent: {absent}): without one, some text could not be encoded")
    if (longest := max(map(len, normal), default=0)) > _MOST_LETTERS:
        raise ValueError(f"a token has {longest} letters, at most {_MOST_LETTERS}: the file is damaged")
    merges = _merges({text: scores[token] for text, token in normal.items()})
    encoder = tokenizers.Tokenizer(models.BPE(vocab=normal | whole | single, merges=merges, byte_fallback=True))
    encoder.normalizer = normalizers.Replace(" ", _SPACE)
    as_it_was = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    encoder.decoder = decoders.Sequence([*as_it_was, decoders.Strip(" ", left=1)] if space_prefix else as_it_was)
    # normalised as the text is: of spaces some files have tokens that are to be found where spaces are spelled already
    encoder.add_tokens([tokenizers.AddedToken(text, normalized=True, special=False) for text in whole])
    return encoder


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Returns every way to put two tokens together to a third, highest score first; of one sum, the longest left part first."""
    cuts = [
        (-score, -cut, text[:cut], text[cut:])
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    cuts.sort(key=lambda each: each[:2])
    return [(left, right) for _, _, left, right in cuts]
