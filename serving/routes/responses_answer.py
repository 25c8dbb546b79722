"""Outputs to OpenAI's response shape: items of message, reasoning and function call, whole or as the numbered events of a stream."""

import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from jaxllm.request import Completion, Output, Request, SamplingParams
from serving.context import Context
from serving.conversation import history_call
from serving.errors import ApiError, encode
from serving.parsers.parts import Call, More, Part, Text, Thought
from serving.protocol import EngineLike, off_loop
from serving.reading import ChoiceReader, Reading, object_of, parts_of
from serving.tools import Tools, call_id
from serving.usage import Usage

if TYPE_CHECKING:
    from serving.routes.responses import ResponseBody


class ResponseAnswer:
    """One request's answer in the response shape; serving.stream drives it. A whole answer is its stream's last event."""

    def __init__(
        self,
        context: Context,
        body: "ResponseBody",
        conversation: list[dict[str, Any]],
        params: SamplingParams,
        tools: Tools,
        reading: Reading | None,
    ):
        self.id = f"resp_{uuid4().hex}"
        self.requests: list[Request] = []
        self._context, self._body, self._conversation = context, body, conversation
        self._reader = None if reading is None else ChoiceReader(reading)
        self._items: list[dict[str, Any]] = []  # the last one is open while _open says of which kind it is
        self._open: type[Part] | None = None
        self._text: list[str] = []  # of the open item
        self._end: Completion | None = None
        self._count = 0
        self._head = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": context.engine.model_name,
            "parallel_tool_calls": bool(tools.tools) and tools.parallel,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": (body.reasoning or {}).get("effort"), "summary": None},
            "store": body.store is not False,
            "temperature": params.temperature,
            "text": {"format": _format(body)},
            "tool_choice": (body.tool_choice or "auto") if tools.tools else "none",
            "tools": [_shown(tool.shown["function"], tool.strict) for tool in tools.tools],
            "top_logprobs": 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "user": body.user,
        }

    def streams(self, engine: EngineLike) -> list[AsyncGenerator[Output, None]]:
        return [engine.generate(request) for request in self.requests]

    async def whole(self, outputs: list[Output], usage: Usage) -> dict:
        ((completion,),) = (output.outputs for output in outputs)
        self.event(0, completion, usage)
        _, response = await self._finish(usage)
        return response

    async def _finish(self, usage: Usage) -> tuple[bytes, dict[str, Any]]:
        """The events that close the last item, and the complete response, stored if it is to be."""
        assert self._end is not None
        cut = self._end.finish_reason == "length"
        status = "incomplete" if cut else "completed"
        events = b"" if self._items else self._tell(Text(""))
        events += self._close(status)
        response = self._response(status) | {
            "completed_at": int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._items,
            "usage": await self._usage(usage),
        }
        if self._body.store is not False:
            messages = [*self._conversation, _message(self._items)]
            await self._context.memory.keep(self.id, encode({"response": response, "messages": messages}).encode())
        return events, response

    async def _usage(self, usage: Usage) -> dict[str, Any]:
        reader, tokenizer = self._reader, self._context.engine.tokenizer
        thought = 0 if reader is None else await off_loop(usage.completion_tokens * 4, lambda: reader.thought_tokens(tokenizer))
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": thought},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }

    def _response(self, status: str) -> dict[str, Any]:
        unknown = {"completed_at": None, "error": None, "incomplete_details": None, "output": [], "usage": None}
        return self._head | {"status": status} | unknown

    # ------------------------------------------------------------------ events

    def _event(self, kind: str, **data: Any) -> bytes:
        body = {"type": kind, "sequence_number": self._count, **data}
        self._count += 1
        return f"event: {kind}\ndata: {encode(body)}\n\n".encode()

    def first(self, i: int, output: Output) -> bytes:
        begun = self._response("in_progress")
        return self._event("response.created", response=begun) + self._event("response.in_progress", response=begun)

    def event(self, i: int, completion: Completion, usage: Usage) -> bytes:
        self._end = completion
        return b"".join(self._tell(part) for part in parts_of(self._reader, completion))

    async def last(self, usage: Usage) -> bytes:
        events, response = await self._finish(usage)
        return events + self._event(f"response.{response['status']}", response=response)

    def failed(self, error: ApiError) -> bytes:
        return self._event("error", code=error.code, message=error.message, param=error.param, **error.body)

    # ------------------------------------------------------------------ items

    def _tell(self, part: Part) -> bytes:
        """The part in the item that is open, or in one of its own."""
        begin = b""
        if isinstance(part, Call) or not (isinstance(part, More) or type(part) is self._open):
            begin = self._close("completed") + self._begin(part)
        text = part.text if isinstance(part, Text | Thought) else part.arguments
        self._text.append(text)
        assert self._open is not None
        kind, place, logprobs = self._kind()
        return begin + (self._event(f"response.{kind}.delta", **place, delta=text, **logprobs) if text else b"")

    def _kind(self) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """How the open item's events are called, where they say they are, and what else they have."""
        place = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
        if self._open is Call:
            return "function_call_arguments", place, {}
        if self._open is Thought:
            return "reasoning_text", place | {"content_index": 0}, {}
        return "output_text", place | {"content_index": 0}, {"logprobs": []}

    def _begin(self, part: Text | Thought | Call) -> bytes:
        self._open = type(part)
        self._items.append(_item(part))
        added = self._event("response.output_item.added", output_index=len(self._items) - 1, item=self._items[-1])
        if isinstance(part, Call):
            return added
        return added + self._event("response.content_part.added", **self._kind()[1], part=_content(type(part), ""))

    def _close(self, status: str) -> bytes:
        """Completes the item that is open, if one is."""
        if self._open is None:
            return b""
        text, item = "".join(self._text), self._items[-1] | {"status": status}
        kind, place, logprobs = self._kind()
        if self._open is Call:
            self._items[-1] = item | {"arguments": text}
            done = self._event(f"response.{kind}.done", **place, name=item["name"], arguments=text)
        else:
            self._items[-1] = item | {"content": [_content(self._open, text)]}
            done = self._event(f"response.{kind}.done", **place, text=text, **logprobs)
            done += self._event("response.content_part.done", **place, part=self._items[-1]["content"][0])
        self._open, self._text = None, []
        return done + self._event("response.output_item.done", output_index=len(self._items) - 1, item=self._items[-1])


def _item(part: Text | Thought | Call) -> dict[str, Any]:
    match part:
        case Text():
            return {"id": f"msg_{uuid4().hex}", "type": "message", "role": "assistant", "status": "in_progress", "content": []}
        case Thought():
            return {"id": f"rs_{uuid4().hex}", "type": "reasoning", "status": "in_progress", "summary": [], "content": []}
        case Call(name, _):
            known = {"call_id": call_id(), "name": name, "arguments": ""}
            return {"id": f"fc_{uuid4().hex}", "type": "function_call", "status": "in_progress", **known}


def _content(kind: type[Part], text: str) -> dict[str, Any]:
    if kind is Thought:
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _format(body: "ResponseBody") -> dict[str, Any]:
    """The form asked for, as it is given back."""
    format = body.text.format if body.text else None
    return {"type": "text"} if format is None else format.model_dump(by_alias=True, exclude_none=True)


def _shown(function: dict[str, Any], strict: bool) -> dict[str, Any]:
    return {"type": "function", "description": None, **function, "strict": strict}


def _message(items: list[dict[str, Any]]) -> dict[str, Any]:
    """The items as one message of the conversation that goes on from here."""
    texts = {kind: "".join(item["content"][0]["text"] for item in items if item["type"] == kind) for kind in ("message", "reasoning")}
    calls = [history_call(i["call_id"], i["name"], object_of(i["arguments"]), "") for i in items if i["type"] == "function_call"]
    thought = {"reasoning_content": texts["reasoning"]} if texts["reasoning"] else {}
    return {"role": "assistant", "content": texts["message"], **thought, **({"tool_calls": calls} if calls else {})}
