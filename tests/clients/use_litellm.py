"""LiteLLM."""

from typing import Literal

import litellm
from programs import ENOUGH, KEY, MODEL, PET_QUESTION, QUESTION, TOOL_QUESTION, URL, WEATHER, is_pet, is_text, is_weather, run
from pydantic import BaseModel

litellm.telemetry = False


class Pet(BaseModel):
    name: str
    kind: Literal["dog", "cat"]
    good: bool


def ask(question: str, **more):
    messages = [{"role": "user", "content": question}]
    return litellm.completion(
        model=f"openai/{MODEL}", api_base=URL, api_key=KEY, messages=messages, max_tokens=ENOUGH, num_retries=0, **more
    )


def chat() -> str:
    answer = ask(QUESTION)
    assert isinstance(answer, litellm.ModelResponse) and answer.usage.completion_tokens > 1
    return is_text(answer.choices[0].message.content)


def stream() -> str:
    return is_text("".join(chunk.choices[0].delta.content or "" for chunk in ask(QUESTION, stream=True)))


def tool() -> str:
    call = ask(TOOL_QUESTION, tools=[WEATHER], tool_choice="required").choices[0].message.tool_calls[0]
    return is_weather(call.function.name, call.function.arguments)


def structured() -> str:
    return is_pet(Pet.model_validate_json(ask(PET_QUESTION, response_format=Pet).choices[0].message.content))


run(chat=chat, stream=stream, tool=tool, structured=structured)
