"""The files of a Hugging Face directory that stand beside its tensors: copied from the directory a model came from, or written for one that had none."""

import json
import pathlib
import shutil
from typing import Any, Mapping

import tokenizers

from pgrpo_jax.models import hugging_face
from pgrpo_jax.models.chat_tokenizer import ChatTokenizer
from pgrpo_jax.models.config import ModelConfig
from pgrpo_jax.models.tokenizer import ByteTokenizer, Tokenizer

# Whatever of a tokenizer may lie in a directory: this package reads tokenizer.json, tokenizer_config.json and chat_template.jinja, others read the rest.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_ROLES = {"bos_token": "bos_id", "eos_token": "eos_id", "pad_token": "pad_id"}


def copy(source: pathlib.Path, directory: pathlib.Path, *, dtype: str) -> None:
    """Copies a model's configuration, which then names the type of the tensors beside it, and its tokenizer.

    Args:
        source: a Hugging Face directory that was loaded.
        directory: there already.
        dtype: of the tensors that are written.
    """
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    names = {"dtype", "torch_dtype"} & values.keys() or {"torch_dtype"}  # the second is the older one, and read by all versions
    _write(directory / "config.json", values | dict.fromkeys(names, dtype))
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def write(directory: pathlib.Path, config: ModelConfig, tokenizer: Tokenizer, *, dtype: str) -> None:
    """Writes the configuration and the tokenizer of a model that did not come from a Hugging Face directory.

    Args:
        directory: there already.
        config: the model's sizes.
        tokenizer: its tokenizer.
        dtype: of the tensors that are written.

    Raises:
        ValueError: no architecture describes the model, or a control token would not keep its id.
    """
    # Their ids default to tokens of the first models of an architecture. A pad token would take its row out of further training in transformers.
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": None}
    _write(directory / "config.json", hugging_face.from_model_config(config) | ids | {"torch_dtype": dtype})
    chat = byte_level(tokenizer) if isinstance(tokenizer, ByteTokenizer) else tokenizer
    _write(directory / "tokenizer.json", _encoder(chat))
    texts = {id_: text for text, id_ in chat.control.items()}
    roles = {name: getattr(chat, attribute) for name, attribute in _ROLES.items()}
    named = {name: texts.get(id_, chat.encoder.id_to_token(id_)) for name, id_ in roles.items() if id_ is not None}
    named |= {"unk_token": chat.names["unknown_token"]} if "unknown_token" in chat.names else {}
    named |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "model_max_length": config.context_length}
    named |= {} if chat.chat_template is None else {"chat_template": chat.chat_template}
    _write(directory / "tokenizer_config.json", named)


def write_generation_config(directory: pathlib.Path, tokenizer: Tokenizer, *, temperature: float, top_k: int, top_p: float) -> None:
    """Writes how a model was sampled when it was trained, and what ends an answer.

    Args:
        directory: there already.
        tokenizer: the model's.
        temperature, top_k, top_p: as `sampler.Support`, whose 0 and 1 switch off as they do in transformers.
    """
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    _write(directory / "generation_config.json", {key: value for key, value in ids.items() if value is not None} | sampling)


def byte_level(tokenizer: ByteTokenizer) -> ChatTokenizer:
    """Returns a byte tokenizer as an encoder and a template: the same ids, texts and chats."""
    # The byte-level alphabet has a letter for each byte: the byte itself where it is printable, the others counted from 256 on.
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}
    encoder = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={letter: byte for byte, letter in letters.items()}, merges=[]))
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder.decoder = tokenizers.decoders.ByteLevel()
    control = {"<|bos|>": tokenizer.bos_id, "<|eos|>": tokenizer.eos_id, "<|pad|>": tokenizer.pad_id}
    return ChatTokenizer(
        encoder, control, vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id,
        stop_ids=tokenizer.stop_ids, chat_template="{{ bos_token }}{% for m in messages %}{{ m['content'] + '\\n' }}{% endfor %}",
        names={"bos_token": "<|bos|>"},
    )  # fmt: skip


def _encoder(chat: ChatTokenizer) -> dict[str, Any]:
    """A `tokenizer.json`: the encoder, and the control tokens, which in this package it does not know, as special tokens at their own ids."""
    values = json.loads(chat.encoder.to_str())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    if chat.prefix and values["added_tokens"]:  # such a file would put the prefix before these tokens as well, and never find them
        raise ValueError(f"a tokenizer that puts {chat.prefix!r} before every text and has user-defined tokens can not be written as tokenizer.json")
    by_id = sorted(chat.control.items(), key=lambda item: item[1])
    values["added_tokens"] = sorted([*values["added_tokens"], *({"id": id_, "content": text, **plain} for text, id_ in by_id)], key=lambda token: token["id"])
    if chat.prefix:
        put_before = {"type": "Prepend", "prepend": chat.prefix}
        values["normalizer"] = {"type": "Sequence", "normalizers": [put_before] + ([values["normalizer"]] if values["normalizer"] else [])}
    values["model"]["vocab"] |= chat.control  # a special token that the vocabulary lacks is numbered anew, behind it
    written = tokenizers.Tokenizer.from_str(json.dumps(values))
    if moved := {text: id_ for text, id_ in by_id if written.token_to_id(text) != id_}:
        raise ValueError(f"control tokens would not keep their ids in tokenizer.json ({moved}): this tokenizer can not be written")
    return values


def _write(file: pathlib.Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="ascii")
