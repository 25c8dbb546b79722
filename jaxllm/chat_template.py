"""Chat messages to prompt text through a model's Jinja template, in a sandbox: a template comes with a checkpoint and may not run code.

Follows what templates on the Hub rely on (huggingface.co/docs/transformers/chat_templating): blocks trimmed, loop controls,
`raise_exception`, `strftime_now`, `tojson` without HTML escapes, and the `generation` tag, which marks text and changes none.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from jaxllm.request import ConfigError, RequestError


class ChatTemplate:
    """Compiled templates of one model. `templates` is {"default": Jinja text, ...}; "tool_use" is taken when tools are given."""

    def __init__(self, templates: Mapping[str, str], special: Mapping[str, str]):
        self._special = dict(special)
        try:
            self._compiled = {name: _ENVIRONMENT.from_string(text) for name, text in templates.items()}
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template has a mistake in line {error.lineno}: {error.message}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        """The prompt text. `kwargs` reach the template (tools, enable_thinking, ...); add_generation_prompt is True unless given.

        continue_final_message=True leaves the last message open, to be continued. Raises RequestError if there is no template
        or if it refuses these messages.
        """
        template = self._compiled.get("tool_use") if kwargs.get("tools") else None
        template = template or self._compiled.get("default") or next(iter(self._compiled.values()), None)
        if template is None:
            raise RequestError("this model has no chat template: give one with --chat-template FILE, or use completions", "messages")
        proceed = kwargs.pop("continue_final_message", False)
        plain = [{**message, "content": join_text(message.get("content"))} for message in messages]
        values = self._special | {"add_generation_prompt": not proceed, "tools": None, "documents": None} | kwargs
        try:
            text = template.render(messages=plain, **values)
        except Exception as error:  # a template is a program of its own: whatever goes wrong in it is the request's
            raise RequestError(f"the chat template refused the messages: {error}", "messages") from error
        return _leave_open(text, plain) if proceed else text


def read_template(given: str) -> str:
    """The text of --chat-template: itself if it looks like a template, else the file that it names."""
    if "{{" in given or "{%" in given or "\n" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--chat-template names {given!r}, which cannot be read ({error.strerror}) and is no template itself") from error


def join_text(content: Any) -> Any:
    """A message's content as templates expect it: text parts joined by newlines, anything but a list as it is."""
    if not isinstance(content, list | tuple):
        return content
    for part in content:
        if isinstance(part, Mapping) and part.get("type", "text") != "text":
            raise RequestError(f"messages hold a part of type {part['type']!r}, but this server reads text parts only", "messages")
    return "\n".join(part if isinstance(part, str) else str(part["text"]) for part in content)


def _leave_open(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """`text` cut after the last message's content, without the template's end of turn."""
    last = str(messages[-1]["content"] or "").strip() if messages else ""
    if not last or last not in text:
        raise RequestError("continue_final_message needs a last message whose content the chat template shows", "messages")
    return text[: text.rindex(last) + len(last)]


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's words for training; here it shows its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own interface)

    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return env


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


_ENVIRONMENT = _environment()
