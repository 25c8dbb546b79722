"""Instructor, whose way to a structured output is a tool or a schema."""

from typing import Literal

import instructor
from openai import OpenAI
from programs import ENOUGH, KEY, MODEL, PET_QUESTION, QUESTION, URL, is_pet, is_text, run
from pydantic import BaseModel


class Pet(BaseModel):
    name: str
    kind: Literal["dog", "cat"]
    good: bool


def client(mode: instructor.Mode) -> instructor.Instructor:
    return instructor.from_openai(OpenAI(base_url=URL, api_key=KEY, max_retries=0), mode=mode)


def ask(question: str, kind: type | None) -> dict:
    messages = [{"role": "user", "content": question}]
    return {"model": MODEL, "messages": messages, "max_tokens": ENOUGH, "max_retries": 0, "response_model": kind}


def chat() -> str:
    answer = client(instructor.Mode.TOOLS).chat.completions.create(**ask(QUESTION, None))
    return is_text(answer.choices[0].message.content)


def stream() -> str:
    chunks = client(instructor.Mode.TOOLS).chat.completions.create(**ask(QUESTION, None), stream=True)
    return is_text("".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices))


def extracted(mode: instructor.Mode) -> str:
    pet = client(mode).chat.completions.create(**ask(PET_QUESTION, Pet))
    assert isinstance(pet, Pet)
    return is_pet(pet)


run(
    chat=chat,
    stream=stream,
    tool=lambda: extracted(instructor.Mode.TOOLS),
    structured=lambda: extracted(instructor.Mode.JSON_SCHEMA),
)
