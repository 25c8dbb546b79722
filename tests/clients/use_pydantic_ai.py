"""Pydantic AI, whose way to a structured output is a tool that must be called, or a schema."""

import asyncio
from typing import Any, Literal

from programs import ENOUGH, KEY, MODEL, PET_QUESTION, QUESTION, URL, is_pet, is_text, run
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key=KEY))


class Pet(BaseModel):
    """A pet."""

    name: str
    kind: Literal["dog", "cat"]
    good: bool


def agent(kind: Any = str) -> Agent:
    return Agent(model, output_type=kind, retries=0, model_settings={"max_tokens": ENOUGH})


def chat() -> str:
    result = agent().run_sync(QUESTION)
    usage = result.usage if not callable(result.usage) else result.usage()
    assert usage.output_tokens > 1
    return is_text(result.output)


def stream() -> str:
    async def streamed() -> list[str]:
        async with agent().run_stream(QUESTION) as result:
            return [text async for text in result.stream_text(delta=True, debounce_by=None)]

    parts = asyncio.run(streamed())
    assert len(parts) > 2
    return is_text("".join(parts))


def pet(kind: Any) -> str:
    found = agent(kind).run_sync(PET_QUESTION).output
    assert isinstance(found, Pet)
    return is_pet(found)


run(chat=chat, stream=stream, tool=lambda: pet(ToolOutput(Pet)), structured=lambda: pet(NativeOutput(Pet)))
