"""Chat templates: programs (Jinja) out of a model's files, in a sandbox, and where a user's message stands in what they write."""

from typing import Any, Mapping, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

_MARK = "\ue000message\ue001"  # stands for the user's message while the template is looked at; private-use characters
_MAX_CHARS = 2**16
_ERRORS = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, SyntaxError, TypeError, ValueError
)  # fmt: skip


class ChatTemplate:
    """What stands around one user message in a model's chat format.

    Args:
        source: Jinja over `messages` and `add_generation_prompt`.
        names: further names it may use, "eos_token" and the like.

    Raises:
        ValueError: it does not compile, fails, or leaves the message out.
    """

    def __init__(self, source: str, names: Mapping[str, str]):
        self._template, self._names = _compiled(source), dict(names)
        if _MARK not in self._rendered(_MARK):
            raise ValueError("the chat template leaves the user's message out: choose a model with a chat template for one user message")

    def around(self, text: str) -> tuple[list[str], str]:
        """Renders one message, with the generation prompt.

        The template is rendered once around a mark: what that text holds, the template wrote, and the message takes the mark's place.

        Returns:
            (what the template wrote, cut where the message stands; the message as it stands there).

        Raises:
            ValueError: the template fails on this text, or changes it in another way than trimming it.
        """
        around, whole = self._rendered(_MARK), self._rendered(text)
        fitting = [content for content in (text, text.strip()) if around.replace(_MARK, content) == whole]
        if not fitting:
            raise ValueError(f"the chat template rewrites the message {text[:40]!r}...: choose a template that inserts it as it is")
        return around.split(_MARK), fitting[0]

    def _rendered(self, text: str) -> str:
        messages = [{"role": "user", "content": text}]
        try:
            return self._template.render(messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._names)
        except _ERRORS as error:
            raise ValueError(f"the chat template fails: {error}; choose a model with a sound chat template") from None


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A template is a program out of the model file: it reads the message and calls nothing."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise jinja2.exceptions.SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__} is unsafe")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _compiled(source: str) -> jinja2.Template:
    """Compiles a chat template under the settings that transformers uses.

    Except for its strftime_now: a prompt must not depend on the day, and templates fall back where it is not defined.
    """
    if len(source) > _MAX_CHARS:
        raise ValueError(f"the chat template has {len(source)} characters, at most {_MAX_CHARS}: choose a model with a sound one")
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(source)
    except _ERRORS as error:
        raise ValueError(f"the chat template does not compile: {error}; choose a model with a sound chat template") from None
