"""Outputs to OpenAI's chat.completion shape: whole, or as the events of a stream.

ChatAnswer is for answers that are text, and writes an event a token in one f-string; ReadChatAnswer for those in which calls and thoughts
must be found first.
"""

import time
from collections.abc import AsyncGenerator, Iterator
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from msgspec.structs import replace

from jaxllm.request import Completion, Logprob, Output, Request
from serving.errors import ApiError, encode
from serving.frame import Frame
from serving.parsers.parts import Call, Part, Text, Thought
from serving.protocol import EngineLike, finite, off_loop, prompt_logprobs_body
from serving.reading import ChoiceReader, Reading
from serving.tools import call_id
from serving.usage import Usage

if TYPE_CHECKING:
    from serving.routes.chat import ChatBody


class ChatAnswer:
    """One request's choices in the chat.completion shape; serving.stream drives it."""

    def __init__(self, engine: EngineLike, body: "ChatBody", fingerprint: str):
        self.id = f"chatcmpl-{uuid4().hex}"
        self.requests: list[Request] = []
        self._body, self._tokenizer = body, engine.tokenizer
        self._head = {
            "id": self.id,
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": engine.model_name,
            "system_fingerprint": fingerprint,
        }
        self._frame = Frame(self._head, body.include_usage, body.continuous_usage)

    def streams(self, engine: EngineLike) -> list[AsyncGenerator[Output, None]]:
        return [engine.generate(request) for request in self.requests]

    async def whole(self, outputs: list[Output], usage: Usage) -> dict:
        (output,) = outputs
        body = {**self._head, "choices": [self._choice(completion) for completion in output.outputs], "usage": usage.body()}
        if self._body.return_token_ids:
            body["prompt_token_ids"] = output.prompt_token_ids
        if self._body.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs_body(output.prompt_logprobs)
        return body

    def _choice(self, completion: Completion) -> dict:
        ids = {"token_ids": completion.token_ids} if self._body.return_token_ids else {}
        return {
            "index": completion.index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": self._logprobs(completion),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
            **ids,
        }

    def first(self, i: int, output: Output) -> bytes:
        """The role, once for every choice, before any text."""
        start = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        if self._body.return_token_ids:
            start += f',"prompt_token_ids":{encode(output.prompt_token_ids)}'
        return b"".join(self._frame.choice(f'{{"index":{j},{start}}}') for j in range(1 if self._body.n is None else self._body.n))

    def event(self, i: int, completion: Completion, usage: Usage) -> bytes:
        return self._delta(f'{{"content":{encode(completion.text)}}}', completion, completion.finish_reason, usage)

    def _delta(self, delta: str, completion: Completion, reason: str | None, usage: Usage) -> bytes:
        """One event. delta: JSON. reason: why the choice ends with it."""
        logprobs = "null" if completion.logprobs is None else encode(self._logprobs(completion))
        end = "null" if reason is None else f'"{reason}","stop_reason":{encode(completion.stop_reason)}'
        if self._body.return_token_ids:
            end += f',"token_ids":{encode(completion.token_ids)}'
        return self._frame.choice(f'{{"index":{completion.index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{end}}}', usage)

    async def last(self, usage: Usage) -> bytes:
        return self._frame.last(usage)

    def failed(self, error: ApiError) -> bytes:
        return self._frame.failed(error)

    def _logprobs(self, completion: Completion) -> dict | None:
        """OpenAI's chat logprobs: each chosen token with the likeliest ones beside it."""
        if completion.logprobs is None:
            return None
        content = [self._token(chosen) | {"top_logprobs": [self._token(t) for t in top]} for chosen, *top in completion.logprobs]
        return {"content": content, "refusal": None}

    def _token(self, logprob: Logprob) -> dict:
        # A token may be a part of a character: then only its bytes are exact.
        text = f"token_id:{logprob.token_id}" if self._body.return_tokens_as_token_ids else logprob.text
        return {"token": text, "logprob": finite(logprob), "bytes": list(self._tokenizer.token_bytes(logprob.token_id))}


class ReadChatAnswer(ChatAnswer):
    """A ChatAnswer whose text holds calls of tools, or thoughts, or may."""

    def __init__(self, engine: EngineLike, body: "ChatBody", fingerprint: str, reading: Reading):
        super().__init__(engine, body, fingerprint)
        self._reading = reading
        self._readers: dict[int, ChoiceReader] = {}
        self._shows_thoughts = body.include_reasoning is not False

    def _reader(self, index: int) -> ChoiceReader:
        if index not in self._readers:
            self._readers[index] = ChoiceReader(self._reading)
        return self._readers[index]

    async def whole(self, outputs: list[Output], usage: Usage) -> dict:
        body = await super().whole(outputs, usage)
        await self._count(usage)
        return body | {"usage": usage.body()}

    def _choice(self, completion: Completion) -> dict:
        reader = self._reader(completion.index)
        parts = reader.read(completion.text, True)
        return super()._choice(completion) | {"message": self._message(parts), "finish_reason": _finish_reason(completion, reader)}

    def _message(self, parts: list[Part]) -> dict:
        text = "".join(part.text for part in parts if isinstance(part, Text))
        calls = [_whole_call(part) for part in parts if isinstance(part, Call)]
        thought = "".join(part.text for part in parts if isinstance(part, Thought))
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls or thought else ""), "refusal": None}
        if thought and self._shows_thoughts:
            message |= _thought(thought)
        return message | ({"tool_calls": calls} if calls else {})

    def event(self, i: int, completion: Completion, usage: Usage) -> bytes:
        reader, ended = self._reader(completion.index), completion.finish_reason is not None
        count = reader.calls
        parts = reader.read(completion.text, ended)
        deltas = list(self._deltas(parts, count))
        if ended or (not deltas and (completion.logprobs is not None or self._body.return_token_ids)):
            deltas.append("{}")
        if not deltas:
            return b""
        last = self._delta(deltas[-1], completion, _finish_reason(completion, reader), usage)
        if len(deltas) == 1:
            return last
        bare = replace(completion, logprobs=None, token_ids=())
        return b"".join((*(self._delta(delta, bare, None, usage) for delta in deltas[:-1]), last))

    def _deltas(self, parts: list[Part], count: int) -> Iterator[str]:
        """Their JSON. count: the calls that began before these parts."""
        for part in parts:
            if isinstance(part, Text):
                yield f'{{"content":{encode(part.text)}}}'  # a token's cost: a dict is walked, a string is not
            elif isinstance(part, Thought):
                if self._shows_thoughts:
                    yield encode(_thought(part.text))
            else:
                if isinstance(part, Call):
                    count += 1
                    yield encode({"tool_calls": [{"index": count - 1, **_whole_call(Call(part.name, ""))}]})
                if part.arguments:
                    yield encode({"tool_calls": [{"index": count - 1, "function": {"arguments": part.arguments}}]})

    async def last(self, usage: Usage) -> bytes:
        await self._count(usage)
        return await super().last(usage)

    async def _count(self, usage: Usage) -> None:
        if self._reading.thinks:
            readers = self._readers.values()
            count = lambda: sum(reader.thought_tokens(self._tokenizer) for reader in readers)  # noqa: E731
            usage.reasoning_tokens = await off_loop(usage.completion_tokens * 4, count)


def _finish_reason(completion: Completion, reader: ChoiceReader) -> str | None:
    return "tool_calls" if reader.calls and completion.finish_reason == "stop" else completion.finish_reason


def _thought(text: str) -> dict[str, str]:
    """Under vLLM's name, and DeepSeek's."""
    return {"reasoning": text, "reasoning_content": text}


def _whole_call(call: Call) -> dict[str, Any]:
    return {"id": call_id(), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
