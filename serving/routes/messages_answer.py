"""Outputs to Anthropic's message shape: blocks of text, thinking and tool use, whole or as the events of a stream."""

from collections.abc import AsyncGenerator
from typing import Any
from uuid import uuid4

from jaxllm.request import Completion, Output, Request
from serving.errors import ApiError, encode
from serving.parsers.parts import Call, More, Part, Text, Thought
from serving.protocol import EngineLike
from serving.reading import ChoiceReader, Reading, object_of, parts_of
from serving.tools import call_id
from serving.usage import Usage


class MessagesAnswer:
    """One request's answer in Anthropic's message shape; serving.stream drives it."""

    def __init__(self, engine: EngineLike, reading: Reading | None, shows_thoughts: bool):
        self.id = f"msg_{uuid4().hex}"
        self.requests: list[Request] = []
        self._model = engine.model_name
        self._reader = None if reading is None else ChoiceReader(reading)
        self._shows_thoughts = shows_thoughts
        self._end: Completion | None = None
        self._open: type[Part] | None = None  # the kind of the block that is being streamed
        self._blocks = 0

    def streams(self, engine: EngineLike) -> list[AsyncGenerator[Output, None]]:
        return [engine.generate(request) for request in self.requests]

    async def whole(self, outputs: list[Output], usage: Usage) -> dict:
        ((completion,),) = (output.outputs for output in outputs)
        blocks = [_filled(part) for part in self._parts(completion)]
        return self._message(blocks or [_filled(Text(""))], usage) | self._stop(completion)

    def _parts(self, completion: Completion) -> list[Part]:
        parts = parts_of(self._reader, completion)
        return parts if self._shows_thoughts else [part for part in parts if not isinstance(part, Thought)]

    def _message(self, content: list[dict], usage: Usage) -> dict:
        head = {"id": self.id, "type": "message", "role": "assistant", "model": self._model, "content": content}
        return head | {"stop_reason": None, "stop_sequence": None, "usage": _usage(usage)}

    def first(self, i: int, output: Output) -> bytes:
        usage = Usage(1)
        usage.prompt(0, Output(output.request_id, None, output.prompt_token_ids, (), False, num_cached_tokens=output.num_cached_tokens))
        return _event("message_start", message=self._message([], usage))

    def event(self, i: int, completion: Completion, usage: Usage) -> bytes:
        self._end = completion
        return b"".join(self._tell(part) for part in self._parts(completion))

    def _tell(self, part: Part) -> bytes:
        """The part in the block that is open, or in one of its own."""
        before = b""
        if isinstance(part, Call) or not (isinstance(part, More) or type(part) is self._open):
            before = self._close() + _event("content_block_start", index=self._blocks, content_block=_empty(part))
            self._open = type(part)
        delta = _delta(part)
        return before + (_event("content_block_delta", index=self._blocks, delta=delta) if delta else b"")

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open, self._blocks = None, self._blocks + 1
        return _event("content_block_stop", index=self._blocks - 1)

    async def last(self, usage: Usage) -> bytes:
        assert self._end is not None
        nothing = self._tell(Text("")) if self._open is None else b""
        delta = _event("message_delta", delta=self._stop(self._end), usage=_usage(usage))
        return nothing + self._close() + delta + _event("message_stop")

    def failed(self, error: ApiError) -> bytes:
        return _event("error", **error.body)

    def _stop(self, end: Completion) -> dict:
        by_string = isinstance(end.stop_reason, str)
        reason = "max_tokens" if end.finish_reason == "length" else "stop_sequence" if by_string else "end_turn"
        if reason != "max_tokens" and self._reader is not None and self._reader.calls:
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": end.stop_reason if reason == "stop_sequence" else None}


def _empty(part: Text | Thought | Call) -> dict[str, Any]:
    match part:
        case Text():
            return {"type": "text", "text": ""}
        case Thought():
            return {"type": "thinking", "thinking": "", "signature": ""}  # nobody signs it
        case Call(name, _):
            return {"type": "tool_use", "id": f"toolu_{call_id()}", "name": name, "input": {}}


def _filled(part: Part) -> dict[str, Any]:
    match part:
        case Text(text):
            return _empty(part) | {"text": text}
        case Thought(text):
            return _empty(part) | {"thinking": text}
        case Call(_, arguments):
            return _empty(part) | {"input": object_of(arguments)}
    raise AssertionError("a call's beginning and end are one part in a whole answer")


def _delta(part: Part) -> dict[str, str] | None:
    match part:
        case Text(text):
            return {"type": "text_delta", "text": text}
        case Thought(text):
            return {"type": "thinking_delta", "thinking": text}
        case Call(_, arguments) | More(arguments):
            return {"type": "input_json_delta", "partial_json": arguments} if arguments else None


def _event(kind: str, **data: Any) -> bytes:
    return f"event: {kind}\ndata: {encode({'type': kind, **data})}\n\n".encode()


def _usage(usage: Usage) -> dict:
    """Anthropic counts the tokens read from a cache by themselves."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
