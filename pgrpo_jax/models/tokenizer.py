"""Text to token ids and back, and the chat template: a user's text is data and can never become a control token.

Token in, token out: the ids that were sampled are the truth. Decoding is for people and rewards; nothing re-encodes it.
"""

import pathlib
from typing import Protocol, Sequence

from pgrpo_jax.models import gguf_tokenizer, hugging_face_tokenizer, weights
from pgrpo_jax.models.chat_tokenizer import ChatTokenizer, check_ids, utf8


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
        return list(utf8(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of the ids below 256. Raises ValueError for an id outside the vocabulary."""
        check_ids(ids, self.vocab_size)
        return bytes(token for token in ids if token < 256).decode("utf-8", errors="replace")

    def render_chat(self, text: str) -> list[int]:
        """Returns bos, the bytes of `text` and a newline."""
        return [self.bos_id, *self.encode(text), *b"\n"]


def load(path: str | pathlib.Path) -> ChatTokenizer:
    """Returns the tokenizer of a model.

    Args:
        path: a GGUF file, a directory holding one, or a Hugging Face directory (see `weights.locate`).

    Raises:
        ValueError: a file is damaged, or its tokenizer is of a kind not known here.
        FileNotFoundError: there is no model at `path`.
    """
    place = weights.locate(path)
    return hugging_face_tokenizer.load(place) if place.is_dir() else gguf_tokenizer.load(place)
