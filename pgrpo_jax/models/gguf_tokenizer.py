"""The tokenizer that a GGUF file carries: byte-level byte-pair encoding."""

import pathlib
from typing import Any, Mapping, Sequence

import numpy as np
import tokenizers

from pgrpo_jax.models import gguf_header
from pgrpo_jax.models.chat_tokenizer import ChatTokenizer

_NORMAL, _CONTROL = 1, 3  # tokenizer.ggml.token_type
# how text is cut before the merges; llama.cpp's names
_PRE_TOKENIZERS = {
    "smollm": (
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    )
}


def load(file: pathlib.Path) -> ChatTokenizer:
    """Returns the tokenizer that a GGUF file carries.

    Args:
        file: a GGUF file.

    Returns:
        The tokenizer.

    Raises:
        ValueError: the file is damaged, or its tokenizer is of a kind not known here.
    """
    metadata = gguf_header.read(file).metadata
    try:
        return _from_metadata(metadata)
    except ValueError as error:
        raise ValueError(f"tokenizer of {file}: {error}") from None


def byte_level_bpe(
    *, tokens: Sequence[str], control_ids: Sequence[int], merges: Sequence[tuple[str, str]], pre_tokenizer: str, chat_template: str,
    special_ids: Mapping[str, int],
) -> ChatTokenizer:  # fmt: skip
    """Builds a tokenizer and checks its template by rendering one message.

    Bytes that the vocabulary has no token for are left out, as the models' own tokenizers do (SmolLM2: six control
    characters, and the first byte of planes that Unicode has not assigned).

    Args:
        tokens: V distinct texts in the byte-level alphabet, by id.
        control_ids: the ids that only a template may place.
        merges: pairs of tokens, the first merge first.
        pre_tokenizer: a key of the pre-tokenizers known here.
        chat_template: Jinja source over `messages` and `add_generation_prompt`.
        special_ids: "eos" and, where the model has them, "bos", "pad", "unknown", "eot" -> id.

    Returns:
        The tokenizer.

    Raises:
        ValueError: an argument contradicts another, or the template fails.
    """
    _check_vocabulary(tokens, control_ids, merges, special_ids)
    if pre_tokenizer not in _PRE_TOKENIZERS:
        raise ValueError(f"pre-tokenizer is {pre_tokenizer!r}, known are {', '.join(sorted(_PRE_TOKENIZERS))}: choose such a model")
    control = {tokens[token]: token for token in control_ids}
    # control tokens are not in the encoder's vocabulary: no text can be encoded as one
    vocabulary = {text: token for token, text in enumerate(tokens) if text not in control}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=list(merges)))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(list(_PRE_TOKENIZERS[pre_tokenizer]))
    bpe.decoder = tokenizers.decoders.ByteLevel()
    eos = special_ids["eos"]
    return ChatTokenizer(
        bpe, control, vocab_size=len(tokens), bos_id=special_ids.get("bos"), eos_id=eos, pad_id=special_ids.get("pad", eos),
        stop_ids={eos, special_ids.get("eot", eos)}, chat_template=chat_template,
        names={f"{name}_token": tokens[token] for name, token in special_ids.items()},
    )  # fmt: skip


def _from_metadata(metadata: Mapping[str, Any]) -> ChatTokenizer:
    prefix = "tokenizer.ggml."
    if (model := metadata.get(prefix + "model")) != "gpt2":
        raise ValueError(f"model is {model!r}, known is 'gpt2' (byte-level BPE): choose such a model")
    tokens, merges, template = metadata.get(prefix + "tokens"), metadata.get(prefix + "merges"), metadata.get("tokenizer.chat_template")
    if not (isinstance(tokens, list) and isinstance(merges, list) and isinstance(template, str)):
        raise ValueError("tokens, merges (lists of texts) or chat template (text) are missing: choose a chat model with its tokenizer")
    kinds = np.ravel(metadata.get(prefix + "token_type", ())).tolist()
    if len(kinds) != len(tokens) or not set(kinds) <= {_NORMAL, _CONTROL}:
        raise ValueError(
            f"{len(tokens)} tokens have {len(kinds)} token types {list(set(kinds))[:8]}, each must be {_NORMAL} (normal) or "
            f"{_CONTROL} (control): choose such a model"
        )
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if wrong := [" ".join(pair) for pair in pairs if len(pair) != 2]:
        raise ValueError(f"merge {wrong[0]!r} must be two tokens with one space between: the file is damaged")
    keys = {"eos": "eos_token_id", "bos": "bos_token_id", "pad": "padding_token_id", "unknown": "unknown_token_id", "eot": "eot_token_id"}
    return byte_level_bpe(
        tokens=tokens,
        control_ids=[token for token, kind in enumerate(kinds) if kind == _CONTROL],
        merges=pairs,
        pre_tokenizer=str(metadata.get(prefix + "pre")),
        chat_template=template,
        special_ids={name: metadata[prefix + key] for name, key in keys.items() if prefix + key in metadata},
    )


def _check_vocabulary(
    tokens: Sequence[str], control_ids: Sequence[int], merges: Sequence[tuple[str, str]], special_ids: Mapping[str, int]
) -> None:
    """Finds what the tokenizers library would answer with a bare Exception, or with silence."""
    if len(set(tokens)) != len(tokens) or "" in tokens:
        raise ValueError(f"{len(tokens)} tokens hold {len(set(tokens) - {''})} distinct texts, all must differ and none be empty")
    normal = set(tokens).difference(tokens[token] for token in control_ids)
    for left, right in merges:
        if not {left, right, left + right} <= normal:
            raise ValueError(f"merge {left!r} + {right!r} needs both and their sum among the normal tokens: the file is damaged")
    if "eos" not in special_ids:
        raise ValueError("there is no eos token: generation could not end")
    for name, token in special_ids.items():
        if type(token) is not int or not 0 <= token < len(tokens):
            raise ValueError(f"{name} token is {token!r}, must be an id in [0, {len(tokens)})")
