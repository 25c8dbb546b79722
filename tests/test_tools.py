"""Tools and reasoning through the routes, as OpenAI's and Anthropic's own clients send and read them."""

import json
from typing import Any

import anthropic
import openai
import pytest
from fake_engine import FakeEngine
from server_fixtures import serving

from jaxllm.chat_template import ChatTemplate
from jaxllm.request import ConfigError
from serving import shapes
from serving.app import build_app
from serving.conversation import parse_messages
from serving.options import ServerOptions
from serving.parsers.table import Parsers

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTIONS = [
    {"name": "get_weather", "description": "The weather in a city", "parameters": CITY},
    {"name": "clock", "description": "The time"},
]
TOOLS: Any = [{"type": "function", "function": function} for function in FUNCTIONS]
FLAT: Any = [{"type": "function", **function} for function in FUNCTIONS]
CLAUDES: Any = [{"name": f["name"], "description": f["description"], "input_schema": f.get("parameters", {})} for f in FUNCTIONS]
ASKED: Any = [{"role": "user", "content": "How is the weather?"}]
PARIS, CLOCK = ("get_weather", {"city": "Paris"}), ("clock", {})
TWO_CALLS = """I look.
<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>
<tool_call>
{"name": "clock"}
</tool_call>"""
ENFORCED = TWO_CALLS.removeprefix("I look.\n").replace('"clock"}', '"clock", "arguments": {}}')
THOUGHT = "<think>\nHm, hm.\n</think>\n\n"
TEMPLATE = """{{- '<tool_call>\\n{"name": ' }} <think> {% if enable_thinking %}"""


@pytest.fixture(scope="module")
def served():
    engine = FakeEngine(max_model_len=4096)
    assert engine.tokenizer is not None
    engine.tokenizer.chat_templates = {"default": TEMPLATE}
    with serving(engine) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    with served.client() as client:
        yield client


@pytest.fixture(scope="module")
def claude(served):
    with anthropic.Anthropic(base_url=served.url, api_key="any", max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture
def says(served):
    """Sets what the model says, and how its prompts end."""

    def set_script(script: str | None, opening: str = "") -> None:
        served.engine.script, served.engine.tokenizer.opening = script, opening

    yield set_script
    set_script(None)


def prompt(served) -> str:
    """The last request's prompt."""
    return served.engine.tokenizer.decode(list(served.engine.served[-1].prompt_token_ids))


def grammar(served) -> str:
    """The last request's."""
    return served.engine.served[-1].params.structured_outputs.grammar


def named(calls) -> list[tuple[str, dict]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls or ()]


def chat(client, **options):
    return client.chat.completions.create(**{"model": "fake", "messages": ASKED, "max_tokens": 1000, **options})


# ---------------------------------------------------------------------------- /v1/chat/completions


def test_calls_in_a_chat(client, served, says):
    says(TWO_CALLS)
    choice = chat(client, tools=TOOLS).choices[0]
    assert (
        choice.finish_reason == "tool_calls" and choice.message.content == "I look." and named(choice.message.tool_calls) == [PARIS, CLOCK]
    )
    ids = {call.id for call in choice.message.tool_calls}
    assert len(ids) == 2 and all(len(id) == 9 and id.isalnum() for id in ids)
    assert '{"name": "get_weather", "description": "The weather in a city", "parameters": {"type": "object"' in prompt(served)
    says(TWO_CALLS.removeprefix("I look.\n"))
    raw = served.post("/v1/chat/completions", {"messages": ASKED, "tools": TOOLS, "max_tokens": 1000})
    shapes.ChatAnswer.model_validate_json(raw.content)
    assert raw.json()["choices"][0]["message"]["content"] is None and "reasoning" not in raw.json()["choices"][0]["message"]


def test_calls_are_streamed_as_openai_streams_them(client, served, says):
    says(TWO_CALLS)
    chunks = [chunk.choices[0] for chunk in chat(client, tools=TOOLS, stream=True)]
    deltas = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert [call.index for call in deltas] == [0, 0, 1, 1]
    assert [call.function.name for call in deltas] == ["get_weather", None, "clock", None]
    assert [bool(call.id) for call in deltas] == [bool(call.type) for call in deltas] == [True, False, True, False]
    assert [call.function.arguments for call in deltas] == ["", '{"city": "Paris"}', "", "{}"]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "I look."
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"] and chunks[0].delta.role == "assistant"
    with client.chat.completions.stream(model="fake", messages=ASKED, tools=TOOLS, max_tokens=1000) as stream:
        final = stream.get_final_completion().choices[0]
    assert named(final.message.tool_calls) == [PARIS, CLOCK] and final.message.content == "I look."


def test_text_streams_on_while_tools_are_there(client, says):
    says("Hello you.")
    texts = [chunk.choices[0].delta.content for chunk in chat(client, tools=TOOLS, stream=True)]
    assert "".join(text or "" for text in texts) == "Hello you." and len([text for text in texts if text]) > 5


def test_one_call_at_most_when_they_are_not_to_be_parallel(client, says):
    says(TWO_CALLS)
    assert named(chat(client, tools=TOOLS, parallel_tool_calls=False).choices[0].message.tool_calls) == [PARIS]
    deltas = [
        call for c in chat(client, tools=TOOLS, parallel_tool_calls=False, stream=True) for call in c.choices[0].delta.tool_calls or ()
    ]
    assert {call.index for call in deltas} == {0}


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_call_is_content(client, says, stream):
    for script, cut in (('<tool_call>{"name": "launch"}</tool_call>', None), (TWO_CALLS, 30)):
        says(script)
        answer = chat(client, tools=TOOLS, stream=stream, max_tokens=cut or 1000)
        if stream:
            choices = [chunk.choices[0] for chunk in answer]
            text, calls, reason = "".join(c.delta.content or "" for c in choices), [c for c in choices if c.delta.tool_calls], choices[-1]
        else:
            text, calls, reason = answer.choices[0].message.content, answer.choices[0].message.tool_calls, answer.choices[0]
        assert text == script[:cut] and not calls and reason.finish_reason == ("length" if cut else "stop")


def test_tools_that_must_not_be_called_are_not_shown(client, served, says):
    says(TWO_CALLS)
    message = chat(client, tools=TOOLS, tool_choice="none").choices[0].message
    assert message.content == TWO_CALLS and not message.tool_calls and "get_weather" not in prompt(served).split("assistant")[0]


def test_a_call_that_must_be_made_is_a_grammar(client, served, says):
    says(ENFORCED)
    assert named(chat(client, tools=TOOLS, tool_choice="required").choices[0].message.tool_calls) == [PARIS, CLOCK]
    city = json.dumps(CITY)[:-1]
    assert all(text in grammar(served) for text in (city, "get_weather", "clock"))
    function: Any = {"type": "function", "function": {"name": "clock"}}
    chat(client, tools=TOOLS, tool_choice=function)
    assert "clock" in grammar(served) and "get_weather" not in grammar(served)
    chat(client, tools=TOOLS)
    assert served.engine.served[-1].params.structured_outputs is None
    chat(client, tools=[TOOLS[0] | {"function": FUNCTIONS[0] | {"strict": True}}, TOOLS[1]])
    assert city in grammar(served) and "text" in grammar(served)


def test_a_call_that_must_be_made_is_streamed_as_it_comes(client, claude, served, says):
    """Its form is certain: nobody has to wait for its end. One that is cut short has what there is."""
    says(THOUGHT + ENFORCED)
    must: dict = {"tools": TOOLS, "tool_choice": "required", "stream": True}
    chunks = [chunk.choices[0] for chunk in chat(client, **must)]
    deltas = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert "".join(call.function.arguments for call in deltas if call.index == 0) == '{"city": "Paris"}' and len(deltas) > 15
    assert [call.function.name for call in deltas if call.id] == ["get_weather", "clock"] and chunks[-1].finish_reason == "tool_calls"
    assert not any(chunk.delta.content for chunk in chunks)

    def kinds(events) -> list[str]:
        return [event.type for event in events]

    begun = len(THOUGHT) + ENFORCED.index('is"}')
    cut = chat(client, tools=TOOLS, tool_choice="required", max_tokens=begun).choices[0]
    assert cut.message.tool_calls[0].function.arguments == '{"city": "Par' and cut.finish_reason == "length" and cut.message.content is None
    events = list(respond(client, tool_choice="required", stream=True))
    assert kinds(events).count("response.function_call_arguments.delta") > 15 and kinds(events).count("response.output_item.done") == 3
    response = respond(client, tool_choice="required", max_output_tokens=begun)
    assert response.output[-1].arguments == '{"city": "Par' and response.output[-1].status == response.status == "incomplete"
    assert client.responses.retrieve(response.id).output[-1].arguments == '{"city": "Par'
    body: dict = {"model": "fake", "messages": ASKED, "tools": CLAUDES, "tool_choice": {"type": "any"}}
    with claude.messages.stream(**body, max_tokens=1000) as stream:
        assert kinds(list(stream)).count("input_json") > 15
        assert [(block.name, block.input) for block in stream.get_final_message().content[1:]] == [PARIS, CLOCK]
    cut = message(claude, tool_choice={"type": "any"}, max_tokens=begun)
    assert (cut.content[-1].input, cut.stop_reason) == ({"city": "Par"}, "max_tokens")
    cut = chat(client, tools=TOOLS, tool_choice="required", max_tokens=len(THOUGHT) + 20).choices[0]
    assert cut.message.content == ENFORCED[:20] and not cut.message.tool_calls


def test_a_form_of_the_answer_beside_thoughts_and_tools(client, served, says):
    """What is thought, or called, is no part of the form; a grammar is of the whole answer."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": CITY}}
    says(THOUGHT + '{"city": "Paris"}')
    for tools in ({}, {"tools": TOOLS}):
        message = chat(client, response_format=form, **tools).choices[0].message
        assert message.content == '{"city": "Paris"}' and message.reasoning == "Hm, hm."
        assert "</think>" in grammar(served) and json.dumps(CITY)[:-1] in grammar(served)
        assert ("get_weather" in grammar(served)) == bool(tools)
    whole = {"structured_outputs": {"grammar": 'start: "<think>"'}}
    assert chat(client, extra_body=whole).choices[0].message.content == THOUGHT + '{"city": "Paris"}'
    assert grammar(served) == 'start: "<think>"'
    with pytest.raises(openai.BadRequestError, match="no place"):
        chat(client, extra_body=whole, tools=TOOLS)
    says('{"city": "Paris"}', "<think></think>")
    chat(client, response_format=form)
    assert served.engine.served[-1].params.structured_outputs.json == json.dumps(CITY)
    text: Any = {"format": {"type": "json_schema", "name": "x", "schema": CITY}}
    says(THOUGHT + '{"city": "Paris"}')
    assert respond(client, text=text).output_text == '{"city": "Paris"}' and "get_weather" in grammar(served)


def test_a_history_of_calls_reaches_the_template_as_objects(client, served, says):
    says("Fine.")
    calls = [{"id": "a1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Pa\\u0072is"}'}}]
    history: Any = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": calls, "reasoning": "Hm."},
        {"role": "tool", "tool_call_id": "a1", "content": [{"type": "text", "text": "Sunny"}]},
    ]
    assert chat(client, messages=history, tools=TOOLS).choices[0].message.content == "Fine."
    assert '"arguments": {"city": "Paris"}' in prompt(served) and '"reasoning_content": "Hm."' in prompt(served)
    assert 'Sunny{"tool_call_id": "a1", "name": "get_weather"}' in prompt(served)
    tokens = served.post("/tokenize", {"messages": history, "tools": TOOLS}).json()["tokens"]
    assert tuple(tokens) == served.engine.served[-1].prompt_token_ids


@pytest.mark.parametrize(
    "template",
    [
        "{{ message.tool_calls[0].function.arguments | tojson }}",  # most: an object
        "{{ '' + message.tool_calls[0].function.arguments + '' }}",  # DeepSeek's: a text beside another
        "{{ message.tool_calls[0].function.arguments ~ '' }}",
        "{% set a = message.tool_calls[0].function.arguments %}{{ a if a is string else a | tojson }}",
        "{% for k, v in message.tool_calls[0].function.arguments.items() %}{{ '{\"' ~ k ~ '\": ' ~ (v | tojson) ~ '}' }}{% endfor %}",
    ],
)
def test_templates_of_either_kind_write_arguments_as_json(template):
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"city": "São Paulo"}'}}
    messages = parse_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])
    made = ChatTemplate({"default": "{% for message in messages %}" + template + "{% endfor %}"}, {})
    assert made.render(messages) == '{"city": "São Paulo"}'


def function(**changes: Any) -> dict:
    return {"tools": [{"type": "function", "function": FUNCTIONS[0] | changes}]}


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
WRONG: list[tuple[dict, str]] = [
    ({"tools": []}, "tools"),
    ({"tools": "x"}, "tools"),
    ({"tools": [5]}, "tools[0].type"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    (function(name=""), "tools[0].function.name"),
    (function(name="a b"), "tools[0].function.name"),
    (function(name="a" * 129), "tools[0].function.name"),
    (function(name=None), "tools[0].function.name"),
    (function(description=5), "tools[0].function.description"),
    (function(strict="yes"), "tools[0].function.strict"),
    (function(parameters=[]), "tools[0].function.parameters"),
    (function(parameters={"type": "string"}), "tools[0].function.parameters"),
    (function(parameters={"type": "object", "properties": []}), "tools[0].function.parameters.properties"),
    (function(parameters={"type": "object", "description": "x" * 70_000}), "tools[0].function.parameters"),
    ({"tools": TOOLS + TOOLS}, "two tools of the name get_weather"),
    ({"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]}, "129 tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "launch"}}}, "launch"),
    ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": "x"}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
    ({"messages": [{"role": "assistant", "tool_calls": [CALL | {"id": 5}]}]}, "messages[0].tool_calls[0].id"),
    ({"messages": [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "{"}}]}]}, "not valid JSON"),
    ({"messages": [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "[]"}}]}]}, "a JSON object"),
    ({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "messages[0].function_call"),
    ({"messages": [{"role": "tool", "tool_call_id": [], "content": ""}]}, "messages[0].tool_call_id"),
    ({"reasoning_effort": "enormous"}, "reasoning_effort"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "says"), WRONG, ids=[f"{i}-{says}" for i, (_, says) in enumerate(WRONG)])
def test_tools_that_are_none(served, body, says):
    response = served.post("/v1/chat/completions", {"messages": ASKED} | body)
    assert response.status_code == 400 and says in response.json()["error"]["message"], response.text


# ---------------------------------------------------------------------------- reasoning


@pytest.mark.parametrize(("script", "opening"), [(THOUGHT + "Sunny.", ""), (THOUGHT.removeprefix("<think>") + "Sunny.", "<think>\n")])
def test_reasoning_in_a_chat(client, says, script, opening):
    says(script, opening)
    answer = chat(client)
    message = answer.choices[0].message
    assert (message.content, message.reasoning, message.reasoning_content) == ("Sunny.", "Hm, hm.", "Hm, hm.")
    assert answer.usage.completion_tokens_details.reasoning_tokens == len("Hm, hm.")
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "Hm, hm."
    assert "".join(getattr(delta, "reasoning", "") for delta in deltas) == "Hm, hm."
    assert "".join(delta.content or "" for delta in deltas) == "Sunny." and chunks[-1].usage == answer.usage
    quiet = chat(client, extra_body={"include_reasoning": False})
    assert not hasattr(quiet.choices[0].message, "reasoning") and quiet.usage.completion_tokens_details.reasoning_tokens == len("Hm, hm.")
    assert quiet.choices[0].message.content == "Sunny."


def test_thinking_that_never_ends_leaves_no_content(client, says):
    says(THOUGHT)
    answer = chat(client, max_tokens=12).choices[0]
    assert answer.message.content is None and answer.message.reasoning == "Hm," and answer.finish_reason == "length"


def test_calls_after_thinking_with_logprobs_and_choices(client, says):
    says(THOUGHT + TWO_CALLS)
    answer = chat(client, tools=TOOLS, n=2, logprobs=True)
    for choice in answer.choices:
        assert choice.message.reasoning == "Hm, hm." and named(choice.message.tool_calls) == [PARIS, CLOCK]
        assert len(choice.logprobs.content) == len(THOUGHT + TWO_CALLS) + 1
    chunks = [chunk.choices[0] for chunk in chat(client, tools=TOOLS, n=2, logprobs=True, stream=True)]
    for index in (0, 1):
        mine = [chunk for chunk in chunks if chunk.index == index]
        assert [call.function.name for c in mine for call in c.delta.tool_calls or () if call.id] == ["get_weather", "clock"]
        assert sum(len(chunk.logprobs.content) for chunk in mine if chunk.logprobs) == len(THOUGHT + TWO_CALLS) + 1


def test_effort_is_what_the_template_makes_of_it(client, served, says):
    says("Hi.")
    seen = []
    tokenizer = served.engine.tokenizer
    spied, tokenizer.chat = tokenizer.chat, lambda messages, **options: seen.append(options) or spied(messages, **options)
    try:
        for template, effort, wanted in (
            (TEMPLATE, "none", {"enable_thinking": False}),
            (TEMPLATE, "high", {"enable_thinking": True}),
            ("{{ reasoning_effort }}", "low", {"reasoning_effort": "low"}),
            ("", "none", {}),
        ):
            tokenizer.chat_templates = {"default": template}
            chat(client, reasoning_effort=effort)
            assert {name: value for name, value in seen[-1].items() if name in ("enable_thinking", "reasoning_effort")} == wanted
        with pytest.raises(openai.BadRequestError, match="says nothing to this model"):
            chat(client, reasoning_effort="high")
    finally:
        del tokenizer.chat
        tokenizer.chat_templates = {"default": TEMPLATE}


def test_a_server_without_a_parser():
    """Auto cannot be read; what is enforced has a form of its own, and is."""
    engine = FakeEngine(max_model_len=4096)
    with serving(engine) as served, served.client() as client:
        with pytest.raises(openai.BadRequestError, match="--tool-call-parser"):
            chat(client, tools=TOOLS)
        engine.script = '[{"name": "clock", "parameters": {}}]'
        assert named(chat(client, tools=TOOLS, tool_choice="required").choices[0].message.tool_calls) == [CLOCK]
        assert chat(client, tools=TOOLS, tool_choice="none").choices[0].message.content == engine.script
        engine.script = THOUGHT
        assert chat(client).choices[0].message.content == THOUGHT
    with pytest.raises(ConfigError, match="name one with --tool-call-parser"):
        build_app(engine, ServerOptions(enable_auto_tool_choice=True))
    named_one = ServerOptions(enable_auto_tool_choice=True, tool_call_parser="llama3_json", reasoning_parser="deepseek_r1")
    with serving(engine, named_one) as served, served.client() as client:
        assert served.app.state.context.parsers == Parsers("llama3_json", "deepseek_r1")
        engine.script = 'Hm.</think>{"name": "clock", "parameters": {}}'
        message = chat(client, tools=TOOLS).choices[0].message
        assert named(message.tool_calls) == [CLOCK] and message.reasoning == "Hm."
        with pytest.raises(openai.BadRequestError, match="`strict` cannot be kept to"):
            chat(client, tools=[TOOLS[0] | {"function": FUNCTIONS[0] | {"strict": True}}])


def test_gpt_oss_channels():
    engine = FakeEngine(max_model_len=4096)
    assert engine.tokenizer is not None
    engine.tokenizer.chat_templates = {"default": "<|start|>assistant<|channel|>analysis<|message|>"}
    analysis = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    with serving(engine) as served, served.client() as client:
        engine.script = analysis + "<|channel|>final<|message|>Sunny."
        for tools in ({}, {"tools": TOOLS}):
            answer = chat(client, **tools)
            assert (answer.choices[0].message.content, answer.choices[0].message.reasoning) == ("Sunny.", "Hm.")
            assert answer.usage.completion_tokens_details.reasoning_tokens == 3
        engine.script = analysis + "<|channel|>commentary to=functions.clock <|constrain|>json<|message|>{}<|call|>"
        for choice in ("auto", "required"):
            assert named(chat(client, tools=TOOLS, tool_choice=choice).choices[0].message.tool_calls) == [CLOCK]
        assert "<|channel|>" in grammar(served)


# ---------------------------------------------------------------------------- /v1/responses


def respond(client, **options):
    return client.responses.create(**{"model": "fake", "input": "How is the weather?", "tools": FLAT, **options})


def test_calls_in_a_response(client, served, says):
    says(THOUGHT + TWO_CALLS)
    response = respond(client)
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
    assert response.output[0].content[0].text == "Hm, hm." and response.output_text == "I look." and response.status == "completed"
    assert [(item.name, json.loads(item.arguments)) for item in response.output[2:]] == [PARIS, CLOCK]
    assert response.usage.output_tokens_details.reasoning_tokens == len("Hm, hm.")
    assert [tool.name for tool in response.tools] == ["get_weather", "clock"] and response.tool_choice == "auto"
    shapes.ResponseAnswer.model_validate_json(served.post("/v1/responses", {"input": "a", "tools": FLAT}).content)
    items: Any = [{"role": "user", "content": "How is the weather?"}, *[item.model_dump(exclude_none=True) for item in response.output]]
    items += [
        {"type": "function_call_output", "call_id": item.call_id, "output": f"Sunny {i}"} for i, item in enumerate(response.output[2:])
    ]
    says("Fine.")
    assert respond(client, input=items).output_text == "Fine."
    whole = prompt(served)
    assert '"reasoning_content": "Hm, hm."' in whole and '"arguments": {"city": "Paris"}' in whole and whole.count('"function"') == 8
    assert "Sunny 0" in whole and '"name": "clock"}' in whole
    respond(client, input=items[-2:], previous_response_id=response.id)
    assert prompt(served) == whole


def test_calls_in_a_streamed_response(client, says):
    says(THOUGHT + TWO_CALLS)
    whole = respond(client)
    events = list(respond(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert kinds[-9:] == [*call, *call, "completed"]
    assert [kind for kind in kinds if "reasoning" in kind and "delta" not in kind] == ["reasoning_text.done"]
    added = [event.item.type for event in events if event.type == "response.output_item.added"]
    assert added == ["reasoning", "message", "function_call", "function_call"]
    assert "".join(event.delta for event in events if event.type == "response.reasoning_text.delta") == "Hm, hm."

    def plain(response) -> list:
        return [item.model_dump(exclude={"id", "call_id"}) for item in response.output]

    assert plain(events[-1].response) == plain(whole)
    with client.responses.stream(model="fake", input="a", tools=FLAT) as stream:
        assert plain(stream.get_final_response())[2:] == [item | {"parsed_arguments": None} for item in plain(whole)[2:]]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"tools": 5}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": FLAT, "tool_choice": {"type": "function", "name": "launch"}}, "launch"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0]"),
        ({"input": [{"type": "function_call", "name": "f", "call_id": "a", "arguments": "{"}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "output": "a"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input[0].output"),
        ({"input": [{"type": "reasoning", "content": 5}]}, "input[0].content"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"reasoning": {"effort": 5}}, "reasoning.effort"),
    ],
)
def test_responses_with_tools_that_are_none(served, body, says):
    response = served.post("/v1/responses", {"input": "a"} | body)
    assert response.status_code == 400 and says in response.json()["error"]["message"], response.text


# ---------------------------------------------------------------------------- /v1/messages


def message(claude, **options):
    return claude.messages.create(**{"model": "fake", "messages": ASKED, "max_tokens": 1000, "tools": CLAUDES, **options})


def test_tools_in_anthropics_messages(claude, served, says):
    says(THOUGHT + TWO_CALLS)
    answer = message(claude)
    assert [block.type for block in answer.content] == ["thinking", "text", "tool_use", "tool_use"] and answer.stop_reason == "tool_use"
    assert answer.content[0].thinking == "Hm, hm." and answer.content[1].text == "I look."
    assert [(block.name, block.input) for block in answer.content[2:]] == [PARIS, CLOCK]
    body = {"messages": ASKED, "max_tokens": 1000, "tools": CLAUDES}
    shapes.MessagesAnswer.model_validate_json(served.post("/v1/messages", body).content)
    with claude.messages.stream(model="fake", messages=ASKED, max_tokens=1000, tools=CLAUDES) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_message()
    assert "input_json" in events and "thinking" in events
    assert [block.model_dump(exclude={"id"}) for block in final.content] == [block.model_dump(exclude={"id"}) for block in answer.content]
    assert final.stop_reason == "tool_use" and final.usage == answer.usage
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "Sunny", "is_error": i == 1}
        for i, block in enumerate(final.content[2:])
    ]
    history: Any = [
        *ASKED,
        {"role": "assistant", "content": final.content},
        {"role": "user", "content": [*results, {"type": "text", "text": "So?"}]},
    ]
    says("Fine.")
    assert message(claude, messages=history).content[0].text == "Fine."
    whole = prompt(served)
    assert '"arguments": {"city": "Paris"}' in whole and '"reasoning_content": "Hm, hm."' in whole
    assert "Error: Sunny" in whole and whole.count("tool\n") == 2 and whole.index("Error") < whole.index("So?")
    assert claude.messages.count_tokens(model="fake", messages=history, tools=CLAUDES).input_tokens == len(
        served.engine.served[-1].prompt_token_ids
    )


def test_anthropics_choices(claude, served, says):
    says(TWO_CALLS)
    assert [b.type for b in message(claude, tool_choice={"type": "auto", "disable_parallel_tool_use": True}).content] == [
        "text",
        "tool_use",
    ]
    assert message(claude, tool_choice={"type": "none"}).content[0].text == TWO_CALLS
    message(claude, tool_choice={"type": "any"})
    assert "get_weather" in served.engine.served[-1].params.structured_outputs.grammar
    message(claude, tool_choice={"type": "tool", "name": "clock"})
    assert "get_weather" not in served.engine.served[-1].params.structured_outputs.grammar
    says(THOUGHT + "Hi.")
    assert [block.type for block in message(claude, thinking={"type": "adaptive"}).content] == ["thinking", "text"]
    assert [block.type for block in message(claude, thinking={"type": "disabled"}).content] == ["text"]
    with pytest.raises(anthropic.BadRequestError, match="budget"):
        message(claude, thinking={"type": "enabled", "budget_tokens": 1024})


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{"name": "f", "input_schema": []}]}, "tools[0].input_schema"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "Anthropic's"),
        ({"tools": CLAUDES, "tool_choice": {"type": "maybe"}}, "tool_choice.type"),
        ({"tools": CLAUDES, "tool_choice": {"type": "tool", "name": "launch"}}, "launch"),
        ({"tools": CLAUDES, "tool_choice": {"type": "any", "disable_parallel_tool_use": 5}}, "disable_parallel_tool_use"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a"}]}]}, "not text"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f"}]}]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}]},
            "only a tool_result",
        ),
    ],
)
def test_messages_with_tools_that_are_none(served, body, says):
    response = served.post("/v1/messages", {"messages": ASKED, "max_tokens": 10} | body)
    assert response.status_code == 400 and says in response.json()["error"]["message"], response.text
