"""The tokenizer that a GGUF file carries: byte-level byte-pair encoding ("gpt2"), or SentencePiece's ("llama", which Gemma's is too)."""

import pathlib
from typing import Any, Mapping, Sequence

import numpy as np
import tokenizers

from pgrpo_jax.models import byte_pairs, gguf_header, gguf_vocabulary
from pgrpo_jax.models.chat_tokenizer import ChatTokenizer
from pgrpo_jax.models.gguf_vocabulary import PREFIX, Vocabulary


def load(file: pathlib.Path) -> ChatTokenizer:
    """Returns the tokenizer that a GGUF file carries.

    Args:
        file: a GGUF file.

    Returns:
        The tokenizer; of a base model, which has no chat template, one that encodes and decodes but refuses to render chats.

    Raises:
        ValueError: the file is damaged, or its tokenizer is of a kind not known here.
    """
    metadata = gguf_header.read(file).metadata
    try:
        return _from_metadata(metadata)
    except ValueError as error:
        raise ValueError(f"tokenizer of {file}: {error}") from None


def byte_level_bpe(vocabulary: Vocabulary, *, merges: Sequence[tuple[str, str]], pre_tokenizer: str, chat_template: str | None) -> ChatTokenizer:
    """Builds a tokenizer around `byte_pairs.byte_level` and checks its template by rendering one message.

    Args:
        vocabulary, merges, pre_tokenizer: as there.
        chat_template: Jinja source over `messages` and `add_generation_prompt`; None = there is none.

    Returns:
        The tokenizer.

    Raises:
        ValueError: an argument contradicts another, or the template fails.
    """
    vocabulary.check()
    return _tokenizer(byte_pairs.byte_level(vocabulary, merges=merges, pre_tokenizer=pre_tokenizer), vocabulary, chat_template)


def sentencepiece_bpe(vocabulary: Vocabulary, *, scores: Sequence[float], space_prefix: bool, chat_template: str | None) -> ChatTokenizer:
    """Builds a tokenizer around `byte_pairs.sentencepiece` and checks its template by rendering one message.

    Args:
        vocabulary, scores: as there.
        space_prefix: a space is put before every text, so that a word is the same token at its beginning as elsewhere.
        chat_template: as `byte_level_bpe`.

    Returns:
        The tokenizer.

    Raises:
        ValueError: as `byte_level_bpe`.
    """
    vocabulary.check()
    encoder = byte_pairs.sentencepiece(vocabulary, scores=scores, space_prefix=space_prefix)
    return _tokenizer(encoder, vocabulary, chat_template, prefix=" " if space_prefix else "")


def _tokenizer(encoder: tokenizers.Tokenizer, vocabulary: Vocabulary, chat_template: str | None, *, prefix: str = "") -> ChatTokenizer:
    tokens, special = vocabulary.tokens, vocabulary.special_ids
    eos = special["eos"]
    return ChatTokenizer(
        encoder, vocabulary.control(), vocab_size=len(tokens), bos_id=special.get("bos"), eos_id=eos, pad_id=special.get("pad", eos),
        stop_ids={eos, special.get("eot", eos)}, chat_template=chat_template, names={f"{name}_token": tokens[token] for name, token in special.items()},
        prefix=prefix,
    )  # fmt: skip


def _from_metadata(metadata: Mapping[str, Any]) -> ChatTokenizer:
    model, template = metadata.get(PREFIX + "model"), metadata.get("tokenizer.chat_template")
    if model not in ("gpt2", "llama"):
        raise ValueError(f"model is {model!r}, known are 'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE): choose such a model")
    if template is not None and not isinstance(template, str):
        raise ValueError("the chat template is no text: the file is damaged")
    vocabulary = gguf_vocabulary.read(metadata)
    if model == "gpt2":
        return byte_level_bpe(vocabulary, merges=_merges(metadata), pre_tokenizer=str(metadata.get(PREFIX + "pre")), chat_template=template)
    flags = {name: metadata.get(PREFIX + name, usual) for name, usual in {"add_space_prefix": True, "remove_extra_whitespaces": False}.items()}
    if wrong := [name for name, flag in flags.items() if type(flag) is not bool]:
        raise ValueError(f"{wrong[0]} is {flags[wrong[0]]!r}, must be True or False")
    if flags["remove_extra_whitespaces"]:
        raise ValueError("remove_extra_whitespaces is True, must be False or absent: text would not come back as it was")
    scores = metadata.get(PREFIX + "scores")
    if not isinstance(scores, np.ndarray):
        raise ValueError("scores (a list of numbers) are missing: choose a model with its tokenizer")
    return sentencepiece_bpe(vocabulary, scores=scores.tolist(), space_prefix=flags["add_space_prefix"], chat_template=template)


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = metadata.get(PREFIX + "merges")
    if not isinstance(merges, list):
        raise ValueError("merges (a list of texts) are missing: choose a model with its tokenizer")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if wrong := [" ".join(pair) for pair in pairs if len(pair) != 2]:
        raise ValueError(f"merge {wrong[0]!r} must be two tokens with one space between: the file is damaged")
    return pairs
