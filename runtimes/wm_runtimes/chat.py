"""Chat templates: Jinja in its immutable environment, as the bundle's manifest brings them."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from wm_graph.errors import InputError

Message = Mapping[str, Any]


class ChatTemplate:
    """A conversation's text.

    Args:
        source: Jinja template; it sees `messages`, `bos_token`, `eos_token`, `add_generation_prompt` and `raise_exception`.
        bos_token: text of the bos token, or empty.
        eos_token: text of the eos token, or empty.
    """

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        self._source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._compiled: Any = None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text of a conversation.

        Args:
            messages: dictionaries with `role` and `content`.
            add_generation_prompt: end where the assistant's answer begins.

        Raises:
            InputError: the messages are malformed, the template refuses them, or it is not valid.
        """
        from jinja2 import TemplateError

        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
                raise InputError(f"message {index}: expected a dictionary with 'role' and 'content'")
        try:
            if self._compiled is None:
                self._compiled = _environment().from_string(self._source)
            text: str = self._compiled.render(messages=list(messages), add_generation_prompt=add_generation_prompt, **self._tokens)
        except _Refusal as error:
            raise InputError(f"chat template: {error}") from error
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            raise InputError(f"chat template: {lines[0]}; repair the template or use plain text") from error
        return text


class _Refusal(Exception):
    """Raised by a template's own `raise_exception`."""


def _environment() -> Any:
    import json

    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise _Refusal(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        # Jinja's own filter escapes for HTML, which models were not trained on.
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = tojson
    return environment
