"""Text to token ids and back, and the chat template: a user's text is data and can never become a control token.

Token in, token out: the ids that were sampled are the truth. Decoding is for people and rewards; nothing re-encodes it.
"""

import pathlib
import re
from typing import Any, Mapping, NoReturn, Protocol, Sequence

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
import tokenizers

from pgrpo_jax.models import gguf_header, weights

_NORMAL, _CONTROL = 1, 3  # tokenizer.ggml.token_type
_MARK = "\ue000message\ue001"  # stands for the user's message while the template is looked at; private-use characters
_MAX_TEMPLATE_CHARS = 2**16
_TEMPLATE_ERRORS = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, SyntaxError, TypeError, ValueError
)  # fmt: skip
# how text is cut before the merges; llama.cpp's names
_PRE_TOKENIZERS = {
    "smollm": (
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    )
}


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer.

    Attributes:
        vocab_size: V; ids are in [0, V).
        bos_id: begins a text, where the model has such a token.
        eos_id: ends an answer.
        pad_id: fills rows beyond their length; may equal eos_id.
        stop_ids: each of them ends generation.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int
    stop_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of plain text: no control token is added, and none is read out of the text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, control tokens left out and broken UTF-8 replaced by U+FFFD."""

    def render_chat(self, text: str) -> list[int]:
        """Returns the ids of one user message in the model's chat format, up to where the answer begins."""


class ByteTokenizer:
    """256 bytes and three control tokens: for tests and for models with random weights. See `Tokenizer`."""

    vocab_size = 259
    bos_id = 256
    eos_id = 257
    pad_id = 258
    stop_ids = (257,)

    def encode(self, text: str) -> list[int]:
        """Returns the UTF-8 bytes of `text`. Raises ValueError for a lone surrogate."""
        return list(_utf8(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of the ids below 256. Raises ValueError for an id outside the vocabulary."""
        _check_ids(ids, self.vocab_size)
        return bytes(token for token in ids if token < 256).decode("utf-8", errors="replace")

    def render_chat(self, text: str) -> list[int]:
        """Returns bos, the bytes of `text` and a newline."""
        return [self.bos_id, *self.encode(text), *b"\n"]


class BpeTokenizer:
    """Byte-level byte-pair encoding with a ChatML-like template (Jinja). See `Tokenizer`; made by `from_gguf`.

    Bytes that the vocabulary has no token for are left out, as the models' own tokenizers do (SmolLM2: six control
    characters, and the first byte of planes that Unicode has not assigned).
    """

    def __init__(
        self,
        *,
        tokens: Sequence[str],
        control_ids: Sequence[int],
        merges: Sequence[tuple[str, str]],
        pre_tokenizer: str,
        chat_template: str,
        special_ids: Mapping[str, int],
    ):
        """Builds the encoder and checks the template by rendering one message.

        Args:
            tokens: V distinct texts in the byte-level alphabet, by id.
            control_ids: the ids that only a template may place.
            merges: pairs of tokens, the first merge first.
            pre_tokenizer: a key of the pre-tokenizers known here.
            chat_template: Jinja source over `messages` and `add_generation_prompt`.
            special_ids: "eos" and, where the model has them, "bos", "pad", "unknown", "eot" -> id.

        Raises:
            ValueError: an argument contradicts another, or the template fails.
        """
        _check_vocabulary(tokens, control_ids, merges, special_ids)
        if pre_tokenizer not in _PRE_TOKENIZERS:
            raise ValueError(f"pre-tokenizer is {pre_tokenizer!r}, known are {', '.join(sorted(_PRE_TOKENIZERS))}: choose such a model")
        self.vocab_size = len(tokens)
        self.eos_id = special_ids["eos"]
        self.bos_id = special_ids.get("bos")
        self.pad_id = special_ids.get("pad", self.eos_id)
        self.stop_ids = tuple(sorted({self.eos_id, special_ids.get("eot", self.eos_id)}))
        self._control = {tokens[token]: token for token in control_ids}
        # control tokens are not in the encoder's vocabulary: no text can be encoded as one
        vocabulary = {text: token for token, text in enumerate(tokens) if text not in self._control}
        self._bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=list(merges)))
        self._bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(list(_PRE_TOKENIZERS[pre_tokenizer]))
        self._bpe.decoder = tokenizers.decoders.ByteLevel()
        longest_first = sorted(self._control, key=len, reverse=True)
        self._control_pattern = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")
        self._template = _compile(chat_template)
        self._template_names = {f"{name}_token": tokens[token] for name, token in special_ids.items()}
        if _MARK not in self._rendered(_MARK):
            raise ValueError("the chat template leaves the user's message out: choose a model with a chat template for one user message")

    def encode(self, text: str) -> list[int]:
        """Returns the ids of plain text; a written "<|im_end|>" stays letters. Raises ValueError for a lone surrogate."""
        _utf8(text)
        return self._bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, control tokens left out. Raises ValueError for an id outside the vocabulary."""
        _check_ids(ids, self.vocab_size)
        return self._bpe.decode([int(token) for token in ids])  # control tokens have no text in the encoder's vocabulary

    def render_chat(self, text: str) -> list[int]:
        """Returns the ids of one user message under the chat template, with the generation prompt.

        The template is rendered once around a mark. Where that text holds control tokens, the template placed them; only
        then does the user's text take the mark's place, together with the plain text beside it (merges may span both).

        Args:
            text: the message.

        Returns:
            Token ids.

        Raises:
            ValueError: the template fails on this text, or changes it in another way than trimming it.
        """
        around, whole = self._rendered(_MARK), self._rendered(text)
        fitting = [content for content in (text, text.strip()) if around.replace(_MARK, content) == whole]
        if not fitting:
            raise ValueError(f"the chat template rewrites the message {text[:40]!r}...: choose a template that inserts it as it is")
        ids: list[int] = []
        for piece in self._control_pattern.split(around):
            ids += [self._control[piece]] if piece in self._control else self.encode(piece.replace(_MARK, fitting[0]))
        return ids

    def _rendered(self, text: str) -> str:
        messages = [{"role": "user", "content": text}]
        try:
            return self._template.render(messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._template_names)
        except _TEMPLATE_ERRORS as error:
            raise ValueError(f"the chat template fails: {error}; choose a model with a sound chat template") from None


def from_gguf(path: str | pathlib.Path) -> BpeTokenizer:
    """Returns the tokenizer that a GGUF file carries.

    Args:
        path: a GGUF file or a directory holding one (see `weights.locate`).

    Returns:
        The tokenizer.

    Raises:
        ValueError: the file is damaged, or its tokenizer is of a kind not known here.
        FileNotFoundError: there is no model at `path`.
    """
    file = weights.locate(path)
    metadata = gguf_header.read(file).metadata
    try:
        return _from_metadata(metadata)
    except ValueError as error:
        raise ValueError(f"tokenizer of {file}: {error}") from None


def _from_metadata(metadata: Mapping[str, Any]) -> BpeTokenizer:
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
    return BpeTokenizer(
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


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text holds a lone surrogate at character {error.start}, must be Unicode: mend the text's source") from None


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    if outside := [int(token) for token in ids if not 0 <= token < vocab_size]:
        raise ValueError(f"token id {outside[0]} must be in [0, {vocab_size}): decode with the tokenizer of the model that sampled it")


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A template is a program out of the model file: it reads the message and calls nothing."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise jinja2.exceptions.SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__} is unsafe")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _compile(source: str) -> jinja2.Template:
    """Compiles a chat template under the settings that transformers uses.

    Except for its strftime_now: a prompt must not depend on the day, and templates fall back where it is not defined.
    """
    if len(source) > _MAX_TEMPLATE_CHARS:
        raise ValueError(f"the chat template has {len(source)} characters, at most {_MAX_TEMPLATE_CHARS}: choose a model with a sound one")
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(source)
    except _TEMPLATE_ERRORS as error:
        raise ValueError(f"the chat template does not compile: {error}; choose a model with a sound chat template") from None
