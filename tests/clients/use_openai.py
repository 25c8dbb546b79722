"""The official client."""

from typing import Literal

from openai import OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from programs import ENOUGH, KEY, MODEL, PET_QUESTION, QUESTION, TOOL_QUESTION, URL, WEATHER, is_pet, is_text, is_weather, run
from pydantic import BaseModel

client = OpenAI(base_url=URL, api_key=KEY, max_retries=0)


class Pet(BaseModel):
    name: str
    kind: Literal["dog", "cat"]
    good: bool


def ask(question: str) -> dict:
    return {"model": MODEL, "messages": [{"role": "user", "content": question}], "max_tokens": ENOUGH}


def chat() -> str:
    answer = client.chat.completions.create(**ask(QUESTION))
    assert isinstance(answer, ChatCompletion) and answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    return is_text(answer.choices[0].message.content)


def stream() -> str:
    text, usage = "", None
    for chunk in client.chat.completions.create(**ask(QUESTION), stream=True, stream_options={"include_usage": True}):
        assert isinstance(chunk, ChatCompletionChunk)
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert usage.completion_tokens > 1
    return is_text(text)


def tool() -> str:
    answer = client.chat.completions.create(**ask(TOOL_QUESTION), tools=[WEATHER], tool_choice="required")
    (call, *_) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls" and call.type == "function" and call.id
    # The result goes back, and the model may now answer in words.
    messages = [*ask(TOOL_QUESTION)["messages"], answer.choices[0].message]
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    last = client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER], tool_choice="none", max_tokens=ENOUGH)
    return is_weather(call.function.name, call.function.arguments) + is_text(last.choices[0].message.content)


def structured() -> str:
    answer = client.chat.completions.parse(**ask(PET_QUESTION), response_format=Pet)
    assert isinstance(answer.choices[0].message.parsed, Pet)
    return is_pet(answer.choices[0].message.parsed)


run(chat=chat, stream=stream, tool=tool, structured=structured)
