"""An encoder of plain text and a chat template, together: only the template can place a control token."""

import re
from typing import Iterable, Mapping, Sequence

import tokenizers

from pgrpo_jax.models.chat_template import ChatTemplate


class ChatTokenizer:
    """An encoder and a chat template. See `Tokenizer`; made by gguf_tokenizer.py and hugging_face_tokenizer.py.

    Args:
        encoder: of plain text; it has no control token in its vocabulary, so that no text can be encoded as one.
        control: text -> id of the tokens that only a template may place.
        vocab_size: V.
        bos_id, eos_id, pad_id, stop_ids: as `Tokenizer`.
        chat_template: Jinja source over `messages` and `add_generation_prompt`; None = the model has none, and no chat is rendered.
        names: further names the template may use, "eos_token" and the like.
        prefix: is put before every text that is encoded; decoding takes it off again.

    Attributes:
        encoder, control, chat_template, names, prefix: as given.

    Raises:
        ValueError: the template fails.
    """

    def __init__(
        self, encoder: tokenizers.Tokenizer, control: Mapping[str, int], *, vocab_size: int, bos_id: int | None, eos_id: int, pad_id: int,
        stop_ids: Iterable[int], chat_template: str | None, names: Mapping[str, str], prefix: str = "",
    ):  # fmt: skip
        self.vocab_size, self.bos_id, self.eos_id, self.pad_id, self.stop_ids = vocab_size, bos_id, eos_id, pad_id, tuple(sorted(set(stop_ids)))
        self.encoder, self.control, self._control_ids = encoder, dict(control), frozenset(control.values())
        self.chat_template, self.names = chat_template, dict(names)
        longest_first = sorted(self.control, key=len, reverse=True)
        self._control_pattern = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")
        self._template, self.prefix = None if chat_template is None else ChatTemplate(chat_template, names), prefix

    def encode(self, text: str) -> list[int]:
        """Returns the ids of plain text; a written "<|im_end|>" stays letters. Raises ValueError for a lone surrogate."""
        utf8(text)
        ids = self.encoder.encode(self.prefix + text, add_special_tokens=False).ids if text else []
        if not self._control_ids.isdisjoint(ids):
            raise ValueError(f"the text {text[:40]!r}... would be encoded as a control token: leave it out")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, control tokens left out. Raises ValueError for an id outside the vocabulary."""
        check_ids(ids, self.vocab_size)
        return self.encoder.decode([int(token) for token in ids if int(token) not in self._control_ids])

    def render_chat(self, text: str) -> list[int]:
        """Returns the ids of one user message under the chat template, with the generation prompt.

        Where what the template wrote holds control tokens, the template placed them; only then does the user's text take its place between,
        together with the plain text beside it (merges may span both).

        Args:
            text: the message.

        Returns:
            Token ids.

        Raises:
            ValueError: the template fails on this text, or changes it in another way than trimming it; or there is none.
        """
        if self._template is None:
            raise ValueError("this is a base model, its files hold no chat template: choose its instruction-tuned version, often named -it or -Instruct")
        written, message = self._template.around(text)
        pieces = [self._control_pattern.split(part) for part in written]  # plain, control, plain, ...
        joined = pieces[0]
        for after in pieces[1:]:
            joined = [*joined[:-1], joined[-1] + message + after[0], *after[1:]]
        ids: list[int] = []
        for number, piece in enumerate(joined):
            ids += [self.control[piece]] if number % 2 else self.encode(piece)
        return ids


def utf8(text: str) -> bytes:
    """Returns the bytes of a text. Raises ValueError for a lone surrogate."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text holds a lone surrogate at character {error.start}, must be Unicode: mend the text's source") from None


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raises ValueError for an id outside [0, vocab_size)."""
    if outside := [int(token) for token in ids if not 0 <= token < vocab_size]:
        raise ValueError(f"token id {outside[0]} must be in [0, {vocab_size}): decode with the tokenizer of the model that sampled it")
