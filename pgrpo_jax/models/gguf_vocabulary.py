"""The vocabulary that a GGUF file carries, checked: what the tokenizers library would answer with a bare Exception, or with silence, is found here."""

from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np

PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
KINDS = {"normal": NORMAL, "unknown": UNKNOWN, "control": CONTROL, "user-defined": USER_DEFINED, "unused": UNUSED, "byte": BYTE}
_SPECIAL = {"eos": "eos_token_id", "bos": "bos_token_id", "pad": "padding_token_id", "unknown": "unknown_token_id", "eot": "eot_token_id"}

_ENDS = {"bos", "eos", "eot"}


class Vocabulary(NamedTuple):
    """Tokens by id.

    Attributes:
        tokens: V distinct texts, as the model spells them.
        kinds: V of `KINDS`.
        special_ids: "eos" and, where the model has them, "bos", "pad", "unknown", "eot" -> id.
    """

    tokens: Sequence[str]
    kinds: Sequence[int]
    special_ids: Mapping[str, int]

    def of(self, *kinds: int) -> dict[str, int]:
        """Returns the tokens of some kinds, text -> id, by ascending id."""
        return {text: token for token, (text, kind) in enumerate(zip(self.tokens, self.kinds, strict=True)) if kind in kinds}

    def control(self) -> dict[str, int]:
        """Returns the tokens that no text may become, text -> id: for templates, or for nothing."""
        return self.of(CONTROL, UNKNOWN, UNUSED)

    def check(self) -> None:
        """Raises ValueError where one part contradicts another."""
        if len(self.kinds) != len(self.tokens) or not set(self.kinds) <= set(KINDS.values()):
            known = ", ".join(f"{kind} ({name})" for name, kind in KINDS.items())
            raise ValueError(
                f"{len(self.tokens)} tokens have {len(self.kinds)} token types, among them {sorted(set(self.kinds))[:8]}, each must be one of {known}: "
                "choose such a model"
            )
        if len(set(self.tokens)) != len(self.tokens) or "" in self.tokens:
            raise ValueError(f"{len(self.tokens)} tokens hold {len(set(self.tokens) - {''})} distinct texts, all must differ and none be empty")
        if "eos" not in self.special_ids:
            raise ValueError("there is no eos token: generation could not end")
        for name, token in self.special_ids.items():
            if type(token) is not int or not 0 <= token < len(self.tokens):
                raise ValueError(f"{name} token is {token!r}, must be an id in [0, {len(self.tokens)})")


def read(metadata: Mapping[str, Any]) -> Vocabulary:
    """Returns the vocabulary of a GGUF file's metadata.

    Raises:
        ValueError: there is none, or one part contradicts another.
    """
    tokens = metadata.get(PREFIX + "tokens")
    if not isinstance(tokens, list):
        raise ValueError("tokens (a list of texts) are missing: choose a model with its tokenizer")
    kinds = np.ravel(metadata.get(PREFIX + "token_type", ())).tolist()
    special = {name: metadata[PREFIX + key] for name, key in _SPECIAL.items() if PREFIX + key in metadata}
    vocabulary = Vocabulary(tokens, kinds, special)
    vocabulary.check()
    for name in _ENDS & special.keys():  # some files call them normal or user-defined: a user's text could then end a turn
        kinds[special[name]] = CONTROL
    return vocabulary
