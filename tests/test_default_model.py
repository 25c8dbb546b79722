"""The models that ship: real Hugging Face checkpoints (logits and prompts as transformers has them), small, and good for something."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import scorecard
import tiny
from model import SIZES, logits
from safetensors.numpy import load_file
from server_fixtures import serving

from jaxllm import LLM, SamplingParams
from jaxllm.source import default_model
from jaxllm.text import Tokenizer

GOLDEN = np.load(Path(__file__).parent / "goldens_default_model.npz")  # by make_default_model_golden.py, under torch
FOLDERS = {"default": default_model(), "draft": default_model().parent / "draft_model"}
BYTES = {"default": 40e6, "draft": 5e6}


@pytest.mark.parametrize("name", FOLDERS)
def test_it_is_small_and_its_files_agree(name):
    folder = FOLDERS[name]
    tokenizer, config = Tokenizer.load(folder), json.loads((folder / "config.json").read_text())
    assert (folder / "model.safetensors").stat().st_size <= BYTES[name]
    assert tokenizer.vocab_size == config["vocab_size"] == 4096 and config["head_dim"] == 64
    assert {tokenizer.eos_token_id, tokenizer.bos_token_id} == set(config["eos_token_id"])
    assert (folder / "tokenizer.json").read_bytes() == (FOLDERS["default"] / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", FOLDERS)
def test_prompts_are_those_of_transformers(name):
    tokenizer = Tokenizer.load(FOLDERS[name])
    assert tokenizer.encode("Once upon a time, there was a dog who had a red kite.") == GOLDEN[f"{name}_ids"].tolist()
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is 2 + 3?"}]
    assert tokenizer.chat(messages) == GOLDEN[f"{name}_chat"].tolist()


@pytest.mark.parametrize("text", ["plain words", "naïve café 日本語 🙂", "a\n\n b\t c", "x" * 50, "<tool_call>"])
def test_every_text_comes_back(text):
    tokenizer = Tokenizer.load(default_model())
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_are_those_of_transformers(name):
    """The engine's decoder and the training network, both in float32, against torch's."""
    ids = GOLDEN[f"{name}_ids"]
    wanted = GOLDEN[f"{name}_logits"]
    weights = {n: jnp.asarray(w, jnp.float32) for n, w in load_file(FOLDERS[name] / "model.safetensors").items()}
    trained = np.asarray(logits(weights, jnp.asarray(ids)[None], SIZES[name]))[0, -3:]
    np.testing.assert_allclose(trained, wanted, atol=1e-4 * np.abs(wanted).max())
    found = tiny.run(tiny.decoder(str(FOLDERS[name])), ids)[-3:]
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.fixture(scope="module")
def llm():
    with LLM(dtype="float32", max_model_len=640, max_num_seqs=2, max_num_batched_tokens=128, enforce_eager=True) as llm:
        yield llm


def test_it_tells_the_story_that_is_asked_for(llm):
    [answer] = llm.chat(
        [{"role": "user", "content": "Tell me a story about a dog and a kite."}], SamplingParams(temperature=0, max_tokens=400)
    )
    text, ended = answer.outputs[0].text, answer.outputs[0].finish_reason
    assert ended == "stop" and "dog" in text and text.count("kite") > 1 and len(text.split()) > 80


def test_it_calls_the_tool_that_is_given(llm):
    asked = json.loads((Path(scorecard.HERE) / "prompts.json").read_text())[-1]
    [answer] = llm.chat([{"role": "user", "content": asked["chat"]}], SamplingParams(temperature=0, max_tokens=60), tools=asked["tools"])
    due = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    assert all(scorecard.judge_call(answer.outputs[0].text, asked["tools"], due).values()), answer.outputs[0].text


def test_strict_tools_are_scored_by_the_servers_grammar(llm):
    """The model calls the parameter what it has learned to; held to the schema, it cannot."""
    parameters = {"type": "object", "properties": {"zq_town": {"type": "string", "description": "Where"}}, "required": ["zq_town"]}
    tool = {"name": "get_weather", "description": "Get the weather in a city", "parameters": parameters}
    chats: Any = [([{"role": "user", "content": "What is the weather in Paris?"}], [{"type": "function", "function": tool}])]
    due = {"name": "get_weather", "arguments": '{"zq_town": "Paris"}'}
    free, held = (scorecard.judge_call(scorecard.ask_all(llm, chats, strict)[0], chats[0][1], due) for strict in (False, True))
    assert free["names a given tool"] and not free["fits its schema"]
    assert held["fits its schema"]


def test_it_says_who_it_is(llm):
    [answer] = llm.chat([{"role": "user", "content": "Who are you?"}], SamplingParams(temperature=0, max_tokens=60))
    assert "jaxllm" in answer.outputs[0].text


# ---------------------------------------------------------------------------- tools, through the server

CITY: dict = {"type": "object", "properties": {"city": {"type": "string"}}}
NUMBERS: dict = {"a": {"type": "integer"}, "b": {"type": "integer"}}
SUM: dict = {"type": "object", "properties": NUMBERS, "required": ["a", "b"], "additionalProperties": False}
FUNCTIONS: list[dict] = [
    {"name": "get_weather", "description": "Get the weather in a city", "parameters": CITY},
    {"name": "add", "description": "Add two numbers", "parameters": SUM},
]
OFFERED: Any = [{"type": "function", "function": function} for function in FUNCTIONS]


@pytest.fixture(scope="module")
def ask(llm):
    with serving(llm.engine) as served, served.client() as client:

        def ask(question: str, **options: Any):
            messages: Any = [{"role": "user", "content": question}]
            common = {"model": llm.engine.model_name, "messages": messages, "tools": OFFERED, "temperature": 0, "max_tokens": 100}
            return client.chat.completions.create(**common | options)

        yield ask


def only_call(answer: Any) -> tuple[str, dict]:
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
    return call.function.name, json.loads(call.function.arguments)


def test_the_default_model_calls_in_its_own_form(ask: Callable):
    assert only_call(ask("What is the weather in Paris?")) == ("get_weather", {"city": "Paris"})
    assert ask("Tell me a story about a dog.").choices[0].message.tool_calls is None


def test_the_default_model_calls_when_it_must(ask: Callable):
    name, arguments = only_call(ask("Tell me a story.", tool_choice="required", parallel_tool_calls=False, temperature=1, seed=1))
    assert name in ("get_weather", "add")
    name, arguments = only_call(ask("What is the weather in Paris?", tool_choice={"type": "function", "function": {"name": "add"}}))
    assert name == "add" and arguments.keys() == {"a", "b"} and all(isinstance(value, int) for value in arguments.values())
    chunks = [chunk.choices[0] for chunk in ask("Add 2 and 3.", tool_choice="required", parallel_tool_calls=False, stream=True)]
    deltas = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    json.loads("".join(call.function.arguments for call in deltas))
    assert deltas[0].function.name in ("get_weather", "add") and chunks[-1].finish_reason == "tool_calls"


def test_the_default_model_keeps_to_strict_schemas_and_still_talks(ask: Callable):
    strict = [{"type": "function", "function": function | {"strict": True}} for function in FUNCTIONS]
    assert only_call(ask("What is the weather in Paris?", tools=strict)) == ("get_weather", {"city": "Paris"})
    free, held = (ask("Who are you?", tools=tools).choices[0].message for tools in (OFFERED, strict))
    assert held.content == free.content and held.tool_calls is None
