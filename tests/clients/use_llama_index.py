"""LlamaIndex, through its client for servers that are like OpenAI's."""

from typing import Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from programs import ENOUGH, KEY, MODEL, PET_QUESTION, QUESTION, TOOL_QUESTION, URL, is_pet, is_text, is_weather, run
from pydantic import BaseModel


class Pet(BaseModel):
    """A pet."""

    name: str
    kind: Literal["dog", "cat"]
    good: bool


def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def llm(**more) -> OpenAILike:
    return OpenAILike(
        model=MODEL, api_base=URL, api_key=KEY, is_chat_model=True, max_tokens=ENOUGH, context_window=1024, max_retries=0, **more
    )


def ask(question: str) -> list[ChatMessage]:
    return [ChatMessage(role="user", content=question)]


def chat() -> str:
    return is_text(llm().chat(ask(QUESTION)).message.content)


def stream() -> str:
    parts = [part.delta or "" for part in llm().stream_chat(ask(QUESTION))]
    assert len(parts) > 2
    return is_text("".join(parts))


def tool() -> str:
    calling = llm(is_function_calling_model=True)
    answer = calling.chat_with_tools([FunctionTool.from_defaults(get_weather)], user_msg=TOOL_QUESTION, tool_required=True)
    call = calling.get_tool_calls_from_response(answer)[0]
    return is_weather(call.tool_name, call.tool_kwargs)


def structured() -> str:
    pet = llm(should_use_structured_outputs=True).as_structured_llm(Pet).chat(ask(PET_QUESTION)).raw
    assert isinstance(pet, Pet)
    return is_pet(pet)


run(chat=chat, stream=stream, tool=tool, structured=structured)
