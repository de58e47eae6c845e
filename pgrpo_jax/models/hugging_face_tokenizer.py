"""The tokenizer of a Hugging Face directory: `tokenizer.json`, and beside it who is who among the special tokens, and the chat template."""

import json
import pathlib
from typing import Any, Iterable

import tokenizers

from pgrpo_jax.models.chat_tokenizer import ChatTokenizer

_MOST_BYTES = {"tokenizer.json": 2**27, "chat_template.jinja": 2**16}
_MOST_BYTES_OF_OTHERS = 2**22
_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


def load(directory: pathlib.Path) -> ChatTokenizer:
    """Returns the tokenizer of a model's directory.

    Args:
        directory: with config.json, tokenizer.json and tokenizer_config.json; the chat template lies in the latter or in chat_template.jinja, further
            tokens that end an answer in generation_config.json.

    Returns:
        The tokenizer.

    Raises:
        ValueError: a file is missing or damaged, or there is no chat template.
    """
    try:
        return _load(directory)
    except ValueError as error:
        raise ValueError(f"tokenizer of {directory}: {error}") from None


def _load(directory: pathlib.Path) -> ChatTokenizer:
    named, model = _values(directory, "tokenizer_config.json"), _values(directory, "config.json")
    encoder = _encoder(directory)
    control = {token.content: id_ for id_, token in encoder.get_added_tokens_decoder().items() if token.special}
    texts = {name: text for name in _NAMES if (text := _text(named, name)) is not None}
    ids = {name: _id(encoder, name, text) for name, text in texts.items()}
    stop_ids = {*_ids(model.get("eos_token_id")), *_ids(_values(directory, "generation_config.json", needed=False).get("eos_token_id"))}
    if "eos_token" in ids:
        stop_ids.add(ids["eos_token"])
    if not stop_ids:
        raise ValueError("there is no eos token: generation could not end; name one in tokenizer_config.json")
    vocab_size, largest = model.get("vocab_size"), max(encoder.get_vocab(with_added_tokens=True).values(), default=-1)
    if type(vocab_size) is not int or not max(largest, *stop_ids) < vocab_size:
        raise ValueError(f"config.json's vocab_size is {vocab_size!r}, the tokens' ids reach to {max(largest, *stop_ids)}: these files are of two models")
    eos = ids.get("eos_token", min(stop_ids))
    return ChatTokenizer(
        encoder, control, vocab_size=vocab_size, bos_id=ids.get("bos_token"), eos_id=eos, pad_id=ids.get("pad_token", eos), stop_ids=stop_ids,
        chat_template=_template(directory, named), names=texts,
    )  # fmt: skip


def _encoder(directory: pathlib.Path) -> tokenizers.Tokenizer:
    source = _read(directory, "tokenizer.json")
    try:
        encoder = tokenizers.Tokenizer.from_str(source)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"tokenizer.json is damaged ({error}): download it again") from None
    encoder.no_padding()
    encoder.no_truncation()
    encoder.encode_special_tokens = True  # as letters: a user's text can not place them
    return encoder


def _template(directory: pathlib.Path, named: dict[str, Any]) -> str:
    if (directory / "chat_template.jinja").is_file():
        return _read(directory, "chat_template.jinja")
    given = named.get("chat_template")
    if isinstance(given, list):  # several, by name
        given = next((each.get("template") for each in given if isinstance(each, dict) and each.get("name") == "default"), None)
    if not isinstance(given, str):
        raise ValueError("there is no chat template: choose a chat model, or write one into chat_template.jinja")
    return given


def _text(named: dict[str, Any], name: str) -> str | None:
    token = named.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(token, str):
        raise ValueError(f"{name} is {named[name]!r}, must be a text")
    return token


def _id(encoder: tokenizers.Tokenizer, name: str, text: str) -> int:
    found = encoder.token_to_id(text)
    if found is None:
        raise ValueError(f"{name} is {text!r}, which tokenizer.json does not have: these files are of two models")
    return found


def _ids(given: Any) -> Iterable[int]:
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if wrong := [each for each in ids if type(each) is not int or each < 0]:
        raise ValueError(f"eos_token_id is {wrong[0]!r}, must be a token's id")
    return ids


def _values(directory: pathlib.Path, name: str, *, needed: bool = True) -> dict[str, Any]:
    if not needed and not (directory / name).is_file():
        return {}
    try:
        values = json.loads(_read(directory, name))
    except RecursionError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{name} must be an object of names and values")
    return values


def _read(directory: pathlib.Path, name: str) -> str:
    file, most = directory / name, _MOST_BYTES.get(name, _MOST_BYTES_OF_OTHERS)
    if not file.is_file():
        raise ValueError(f"{name} is missing: download the whole directory")
    if file.stat().st_size > most:
        raise ValueError(f"{name} has {file.stat().st_size} bytes, at most {most}")
    return file.read_text(encoding="utf-8")
