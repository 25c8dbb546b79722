"""LangChain."""

from typing import Literal

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.tools import tool as as_tool
from langchain_openai import ChatOpenAI
from programs import ENOUGH, KEY, MODEL, PET_QUESTION, QUESTION, TOOL_QUESTION, URL, is_pet, is_text, is_weather, run
from pydantic import BaseModel

model = ChatOpenAI(base_url=URL, api_key=KEY, model=MODEL, max_tokens=ENOUGH, max_retries=0)


class Pet(BaseModel):
    """A pet."""

    name: str
    kind: Literal["dog", "cat"]
    good: bool


@as_tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def chat() -> str:
    answer = model.invoke(QUESTION)
    assert isinstance(answer, AIMessage) and answer.usage_metadata["output_tokens"] > 1
    return is_text(answer.content)


def stream() -> str:
    chunks = list(model.stream(QUESTION))
    assert len(chunks) > 2 and all(isinstance(chunk, AIMessageChunk) for chunk in chunks)
    return is_text("".join(chunk.content for chunk in chunks))


def tool() -> str:
    answer = model.bind_tools([get_weather], tool_choice="required").invoke(TOOL_QUESTION)
    call = answer.tool_calls[0]
    assert get_weather.invoke(call).content.startswith("sunny in")
    return is_weather(call["name"], call["args"])


def structured() -> str:
    pet = model.with_structured_output(Pet, method="json_schema").invoke(PET_QUESTION)
    assert isinstance(pet, Pet)
    return is_pet(pet)


run(chat=chat, stream=stream, tool=tool, structured=structured)
