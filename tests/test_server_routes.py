"""The routes beside the two completions, through the clients that people use for them, and the fields that vLLM's users send."""

import asyncio
import base64
import json
import re
import struct

import anthropic
import httpx
import openai
import pytest
from fake_engine import EOS, FakeEngine
from prometheus_client.parser import text_string_to_metric_families
from server_fixtures import ENGINES, make_engine, serving

from jaxllm.config import EngineConfig
from jaxllm.request import StructuredOutputs
from serving import shapes
from serving.memory import Store
from serving.options import ServerOptions

CHAT = [{"role": "user", "content": "Tell me a story"}]


@pytest.fixture(scope="module", params=ENGINES)
def served(request):
    engine = make_engine(request.param)
    try:
        with serving(engine, ServerOptions(enable_admin_routes=True)) as served:
            yield served
    finally:
        engine.close()


@pytest.fixture(scope="module")
def client(served):
    with served.client() as client:
        yield client


@pytest.fixture(scope="module")
def claude(served):
    with anthropic.Anthropic(base_url=served.url, api_key="any", max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def name(served):
    return served.engine.model_name


def shaped(shape, response):
    """The answer, held to what /openapi.json says of it."""
    assert response.status_code == 200, response.text
    shape.model_validate_json(response.content)
    return response.json()


# ---------------------------------------------------------------------------- responses


def respond(client, name, **options):
    return client.responses.create(**{"model": name, "input": "Tell me a story", "temperature": 0, "max_output_tokens": 12, **options})


def test_a_response_says_what_chat_says(client, served, name):
    chat = client.chat.completions.create(model=name, messages=CHAT, temperature=0, max_tokens=12)
    response = respond(client, name)
    assert response.output_text == chat.choices[0].message.content and response.usage.output_tokens == 12
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    body = {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Tell me a story"}]}], "max_output_tokens": 12}
    raw = shaped(shapes.ResponseAnswer, served.post("/v1/responses", body | {"temperature": 0}))
    assert raw["output"][0]["content"][0]["text"] == response.output_text


def test_a_streamed_response_says_the_same_in_numbered_events(client, name):
    whole = respond(client, name)
    events = list(respond(client, name, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert [event.type for event in events[-4:]] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text and events[-1].response.usage == whole.usage


def test_a_response_that_ends_by_itself_is_completed(client, served, name):
    end = {"allowed_token_ids": [getattr(served.engine.tokenizer, "eos_token_id", EOS)]}
    with client.responses.stream(model=name, input="Tell me a story", extra_body=end) as stream:
        assert stream.get_final_response().status == "completed"


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_goes_on_from_a_stored_one(client, name, stream):
    first = respond(client, name, instructions="Be brief", metadata={"a": "b"})
    conversation = [*CHAT, {"role": "assistant", "content": first.output_text}, {"role": "user", "content": "And then?"}]
    chat = client.chat.completions.create(model=name, messages=conversation, temperature=0, max_tokens=12)
    answer = respond(client, name, input="And then?", previous_response_id=first.id, stream=stream)
    second = list(answer)[-1].response if stream else answer
    assert second.output_text == chat.choices[0].message.content and second.usage.input_tokens == chat.usage.prompt_tokens
    assert client.responses.retrieve(second.id) == second
    assert client.responses.retrieve(first.id).metadata == {"a": "b"}
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError, match="no stored response"):
        respond(client, name, previous_response_id=first.id)
    unstored = respond(client, name, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(unstored.id)


# ---------------------------------------------------------------------------- structured outputs

PET = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "legs": {"enum": [2, 4]}},
    "required": ["name", "legs"],
    "additionalProperties": False,
}
NAMED = {"name": "pet", "schema": PET, "strict": True}


@pytest.mark.parametrize(
    ("body", "form"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": NAMED}}, {"json": PET}),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        ({"response_format": {"type": "text"}}, None),
        ({"structured_outputs": {"json": PET}}, {"json": PET}),
        ({"structured_outputs": {"json": json.dumps(PET)}}, {"json": PET}),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, {"regex": "[0-9]{3}"}),
        ({"structured_outputs": {"choice": ["cat", "dog"]}, "response_format": {"type": "text"}}, {"choice": ["cat", "dog"]}),
        ({"structured_outputs": {"grammar": 'start: "moo" "!"*'}}, {"grammar": 'start: "moo" "!"*'}),
        ({"structured_outputs": {"json_object": True}}, {"json_object": True}),
    ],
    ids=lambda value: repr(value)[:60],
)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_form_is_asked_for_in_every_spelling(served, path, body, form, stream):
    asked = {"prompt": "Once"} if path == "/v1/completions" else {"messages": CHAT}
    asked |= {"max_tokens": 150, "seed": 1} | body
    if stream:
        events = [json.loads(event) for event in served.events(path, asked) if event != "[DONE]"]
        choices = [choice for event in events for choice in event["choices"]]
        text = "".join(choice.get("text") or choice.get("delta", {}).get("content", "") for choice in choices)
        reason = choices[-1]["finish_reason"]
    else:
        (choice,) = served.post(path, asked).json()["choices"]
        text, reason = choice.get("text") or choice["message"]["content"], choice["finish_reason"]
    check_form(served, form, text, reason)


def check_form(served, form, text, reason):
    """The fake engine shows what it was asked, the real one does it."""
    if isinstance(served.engine, FakeEngine):
        assert served.engine.served[-1].params.structured_outputs == (form and StructuredOutputs(**form))
    elif form is not None and reason == "stop":
        if "json" in form:
            pet = json.loads(text)
            assert set(pet) == {"name", "legs"} and len(pet["name"]) <= 12 and pet["legs"] in (2, 4)
        elif "json_object" in form:
            assert isinstance(json.loads(text), dict)
        else:
            assert re.fullmatch(form.get("regex") or "|".join(form.get("choice", ["moo!*"])), text)
    else:
        assert form is None or "json_object" in form or "grammar" in form, f"{text!r} did not end"


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_has_a_form_too(client, served, name, stream):
    text = {"format": {"type": "json_schema", **NAMED}}
    answer = client.responses.create(model=name, input="A pet", max_output_tokens=150, text=text, stream=stream)
    response = list(answer)[-1].response if stream else answer
    assert response.text.format.type == "json_schema" and response.text.format.name == "pet" and response.text.format.schema_ == PET
    check_form(served, {"json": PET}, response.output_text, "stop" if response.status == "completed" else "length")
    assert respond(client, name, text={"format": {"type": "text"}}).text.format.type == "text"


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/v1/completions", {"structured_outputs": {}}, "exactly one"),
        ("/v1/completions", {"structured_outputs": {"json": {}, "regex": "a"}}, "exactly one"),
        ("/v1/completions", {"structured_outputs": {"whitespace_pattern": "a", "json": {}}}, "whitespace_pattern"),
        ("/v1/completions", {"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
        ("/v1/completions", {"structured_outputs": "json"}, "structured_outputs"),
        ("/v1/completions", {"structured_outputs": {"regex": "a" * 200_001}}, "at most 200000"),
        ("/v1/completions", {"guided_json": PET}, "`structured_outputs`"),
        ("/v1/completions", {"response_format": {"type": "structural_tag"}}, "response_format"),
        ("/v1/completions", {"response_format": {"type": "json_schema"}}, "json_schema"),
        ("/v1/completions", {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "without its `schema`"),
        ("/v1/completions", {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "send one of them"),
        ("/v1/responses", {"structured_outputs": {"regex": "a"}}, "`text.format`"),
        ("/v1/responses", {"text": {"verbosity": "low"}}, "verbosity"),
        ("/v1/responses", {"text": {"format": {"type": "json_schema", "name": "a"}}}, "without its `schema`"),
        ("/v1/messages", {"structured_outputs": {"regex": "a"}, "max_tokens": 5}, "structured_outputs"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_forms_that_nobody_can_ask_for(served, path, body, says):
    prompt = {"/v1/completions": {"prompt": "a"}, "/v1/responses": {"input": "a"}, "/v1/messages": {"messages": CHAT}}[path]
    answer = served.post(path, prompt | body)
    assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_form_that_cannot_be_honoured_is_a_400(served, stream):
    if isinstance(served.engine, FakeEngine):
        return  # it compiles nothing
    body = {"prompt": "a", "stream": stream, "structured_outputs": {"json": {"uniqueItems": True}}}
    answer = served.post("/v1/completions", body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "structured_outputs")
    assert "structured_outputs.json cannot be honoured" in answer.json()["error"]["message"] and "uniqueItems" in answer.text


def test_what_is_stored_gives_way_oldest_first():
    store = Store(limit=30)
    for key in "abc":
        store.keep(key, b"0123456789")
    assert store.recall("a")
    store.keep("d", b"0123456789")
    assert store.recall("b") is None and all(store.recall(key) for key in "acd")
    store.keep("a", b"0" * 20)
    store.keep("d", None)
    assert store.recall("d") is store.recall("c") is None and store.recall("a") == b"0" * 20


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "must be a text"),
        ([], "not empty"),
        (5, "must be a text"),
        ([5], "input[0]"),
        ([{"type": "function_call_output"}], "other items"),
        ([{"role": "ghost", "content": "a"}], "input[0].role"),
        ([{"role": "user", "content": [{"type": "input_image"}]}], "not text"),
        ([{"role": "user"}], "input[0].content"),
    ],
)
def test_inputs_that_are_none(served, given, says):
    response = served.post("/v1/responses", {"input": given})
    assert response.status_code == 400 and says in response.json()["error"]["message"]


# ---------------------------------------------------------------------------- messages


def test_messages(claude, client, served, name):
    chat = client.chat.completions.create(model=name, messages=CHAT, temperature=0, max_tokens=12)
    body: dict = {"model": name, "messages": CHAT, "max_tokens": 12, "extra_body": {"temperature": 0}}
    message = claude.messages.create(**body)
    assert message.content[0].text == chat.choices[0].message.content and message.stop_reason == "max_tokens"
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens == chat.usage.prompt_tokens
    assert message.usage.output_tokens == 12
    with claude.messages.stream(**body) as stream:
        pieces = list(stream.text_stream)
        assert stream.get_final_message().content[0].text == "".join(pieces) == message.content[0].text and len(pieces) > 1
    assert claude.messages.count_tokens(model=name, messages=CHAT).input_tokens == chat.usage.prompt_tokens
    del body["extra_body"]
    shaped(shapes.MessagesAnswer, served.post("/v1/messages", body))
    shaped(shapes.CountAnswer, served.post("/v1/messages/count_tokens", body))


def test_messages_end_at_a_stop_sequence_and_go_on_from_an_answer(claude, name):
    body: dict = {"model": name, "messages": CHAT, "max_tokens": 12, "extra_body": {"temperature": 0}}
    text = claude.messages.create(**body).content[0].text
    stopped = claude.messages.create(**body, stop_sequences=[text[4:7]])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", text[4:7])
    system = [{"type": "text", "text": "Be brief"}]
    longer = claude.messages.count_tokens(model=name, messages=CHAT, system=system).input_tokens
    assert longer > claude.messages.count_tokens(model=name, messages=CHAT).input_tokens
    begun = [*CHAT, {"role": "assistant", "content": [{"type": "text", "text": "Once"}]}]
    goes_on = claude.messages.count_tokens(model=name, messages=begun).input_tokens
    assert goes_on < claude.messages.count_tokens(model=name, messages=[*begun, *CHAT]).input_tokens
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        claude.messages.create(**body | {"max_tokens": 0})
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(**body | {"model": "gpt-4"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "system", "content": "a"}]}, "user or assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "not text"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"system": 5}, "`system`"),
        ({"max_tokens": None}, "`max_tokens` is missing"),
        ({"tools": [{"name": "f"}]}, "`tools` is not supported"),
        ({"stop_sequences": [""]}, "stop"),
    ],
)
def test_messages_that_are_none(served, change, says):
    response = served.post("/v1/messages", {"messages": CHAT, "max_tokens": 2} | change)
    assert response.status_code == 400 and says in response.json()["error"]["message"]


# ---------------------------------------------------------------------------- embeddings


def test_embeddings(client, served, name):
    texts = ["Once upon a time", "The cat sat", "Once upon a time"]
    made = client.embeddings.create(model=name, input=texts, encoding_format="float")
    vectors = [item.embedding for item in made.data]
    assert [item.index for item in made.data] == [0, 1, 2] and made.usage.prompt_tokens == made.usage.total_tokens > 3
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-5) and vectors[0] != pytest.approx(vectors[1], abs=1e-2)
    assert all(sum(x * x for x in vector) == pytest.approx(1) for vector in vectors)
    assert client.embeddings.create(model=name, input=texts).data[1].embedding == pytest.approx(vectors[1], abs=1e-5)  # base64
    ids = served.engine.tokenizer.encode(texts[1])
    body = {"input": [ids], "encoding_format": "base64", "dimensions": 4}
    raw = shaped(shapes.EmbeddingAnswer, served.post("/v1/embeddings", body))["data"][0]["embedding"]
    four = struct.unpack("<4f", base64.b64decode(raw))
    length = sum(x * x for x in vectors[1][:4]) ** 0.5
    assert four == pytest.approx([x / length for x in vectors[1][:4]], abs=1e-5)
    with pytest.raises(openai.BadRequestError, match="dimensions is 100000"):
        client.embeddings.create(model=name, input="a", dimensions=100_000)
    with pytest.raises(openai.BadRequestError, match="`input`"):
        client.embeddings.create(model=name, input=[])


def test_scores_and_ranks_are_the_embeddings_cosines(client, served, name):
    query, texts = "Once upon a time", ["The cat sat", "Once upon a time", "A dog"]
    made = client.embeddings.create(model=name, input=[query, *texts], encoding_format="float").data
    cosines = [sum(a * b for a, b in zip(made[0].embedding, item.embedding, strict=True)) for item in made[1:]]
    scored = shaped(shapes.ScoreAnswer, served.post("/v1/score", {"text_1": query, "text_2": texts}))["data"]
    assert [item["score"] for item in scored] == pytest.approx(cosines, abs=1e-4)
    pairs = shaped(shapes.ScoreAnswer, served.post("/v1/score", {"text_1": texts, "text_2": texts}))["data"]
    assert [item["score"] for item in pairs] == pytest.approx([1, 1, 1], abs=1e-4)
    ranked = shaped(shapes.RerankAnswer, served.post("/v1/rerank", {"query": query, "documents": texts, "top_n": 2}))["results"]
    assert [item["index"] for item in ranked] == sorted(range(3), key=lambda i: -cosines[i])[:2]
    assert ranked[0]["document"] == {"text": query} and ranked[0]["relevance_score"] == pytest.approx(1, abs=1e-4)
    bare = served.post("/v1/rerank", {"query": query, "documents": texts, "return_documents": False}).json()["results"]
    assert len(bare) == 3 and all("document" not in item for item in bare)
    for path, body in (
        ("/v1/score", {"text_1": texts, "text_2": texts[:2]}),
        ("/v1/score", {"text_1": "a"}),
        ("/v1/score", {"text_1": [1], "text_2": "a"}),
        ("/v1/rerank", {"documents": texts}),
        ("/v1/rerank", {"query": "a", "documents": []}),
    ):
        assert served.post(path, body).status_code == 400


# ---------------------------------------------------------------------------- tokens


def test_tokenize_and_back(served, client, name):
    text = "Once upon a time"
    body = shaped(shapes.TokenizeAnswer, served.post("/tokenize", {"prompt": text, "return_token_strs": True}))
    assert body["tokens"] == served.engine.tokenizer.encode(text) and body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["max_model_len"] == served.engine.max_model_len
    plain = served.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert shaped(shapes.DetokenizeAnswer, served.post("/detokenize", {"tokens": plain})) == {"prompt": text}
    chat = served.post("/tokenize", {"messages": CHAT}).json()
    used = client.chat.completions.create(model=name, messages=CHAT, max_tokens=1).usage
    assert chat["count"] == used.prompt_tokens and "token_strs" not in chat
    for path, wrong in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": CHAT}),
        ("/tokenize", {"messages": CHAT, "add_special_tokens": True}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": [served.engine.vocab_size]}),
        ("/detokenize", {"tokens": [-1]}),
    ):
        assert served.post(path, wrong).status_code == 400


# ---------------------------------------------------------------------------- fields


def complete(served, **body):
    answer = shaped(
        shapes.CompletionAnswer, served.post("/v1/completions", {"prompt": "Once upon", "temperature": 0, "max_tokens": 6} | body)
    )
    return answer["choices"][0], answer["usage"]


def test_only_allowed_tokens_come(served):
    tokens = served.engine.tokenizer.encode("xy", add_special_tokens=False)
    choice, _ = complete(served, allowed_token_ids=tokens, return_token_ids=True)
    assert set(choice["token_ids"]) <= set(tokens) and len(choice["token_ids"]) == 6


def test_bad_words_do_not_come(served, name):
    if name == "fake":
        pytest.skip("the fake engine knows no words")
    free, _ = complete(served, max_tokens=20, prompt="Once upon a time")
    word = free["text"].split()[3]
    banned, _ = complete(served, max_tokens=20, prompt="Once upon a time", bad_words=[word])
    assert word not in banned["text"].split() and banned["text"].split()[:3] == free["text"].split()[:3]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("allowed_token_ids", bad) for bad in ([], [10**6])],
        *[("bad_words", bad) for bad in ([""], ["a"] * 129)],
        *[("cache_salt", bad) for bad in ("", "a" * 129)],
        *[("truncate_prompt_tokens", bad) for bad in (0, -2)],
        ("priority", 1),
    ],
)
def test_wrong_values_of_vllms_fields(served, field, value):
    response = served.post("/v1/completions", {"prompt": "a", field: value})
    assert response.status_code == 400 and response.json()["error"]["param"] == field


def test_a_prompt_is_truncated_to_its_end(served):
    ids = served.engine.tokenizer.encode("Once upon a time there was")
    choice, usage = complete(served, prompt=ids, truncate_prompt_tokens=3, return_token_ids=True)
    assert choice["prompt_token_ids"] == ids[-3:] and usage["prompt_tokens"] == 3
    long = ids * 100
    choice, usage = complete(served, prompt=long, truncate_prompt_tokens=-1, return_token_ids=True, ignore_eos=True)
    assert usage["total_tokens"] == served.engine.max_model_len and usage["completion_tokens"] == 6
    body = {"messages": CHAT, "truncate_prompt_tokens": 5, "max_tokens": 1}
    assert served.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens"] == 5


def test_a_salt_keeps_prompts_apart(served, name):
    if name == "fake":
        pytest.skip("the fake engine caches nothing")
    ids = served.engine.tokenizer.encode("Salt and pepper") * 30
    cached = []
    for salt in ("a", "b", "a"):
        _, usage = complete(served, prompt=ids[:200], max_tokens=1, cache_salt=salt)
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert cached[:2] == [0, 0] and cached[2] > 100
    assert served.post("/reset_prefix_cache").status_code == 200
    _, usage = complete(served, prompt=ids[:200], max_tokens=1, cache_salt="a")
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_token_ids_beside_and_in_place_of_text(served, path):
    body: dict = {"temperature": 0, "max_tokens": 4, "return_token_ids": True, "return_tokens_as_token_ids": True}
    body |= {"prompt": "Once", "logprobs": 1} if path == "/v1/completions" else {"messages": CHAT, "logprobs": True, "top_logprobs": 1}
    whole = served.post(path, body).json()
    choice = whole["choices"][0]
    prompt = choice.get("prompt_token_ids") or whole["prompt_token_ids"]
    found = choice["logprobs"]
    named = found["tokens"] if "tokens" in found else [entry["token"] for entry in found["content"]]
    assert named == [f"token_id:{token}" for token in choice["token_ids"]] and len(named) == 4
    first, *rest = [json.loads(event) for event in served.events(path, body)[:-1]]
    assert first["choices"][0]["prompt_token_ids"] == prompt and first["choices"][0].get("token_ids", []) == []
    assert [token for event in rest for token in event["choices"][0]["token_ids"]] == choice["token_ids"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_usage_in_every_event(served, path):
    options = {"continuous_usage_stats": True, "include_usage": True}
    body = {"prompt": "Once", "messages": CHAT, "max_tokens": 3, "ignore_eos": True, "stream_options": options}
    body.pop("messages" if path == "/v1/completions" else "prompt")
    *chunks, last, done = served.events(path, body)
    counts = [usage["completion_tokens"] for chunk in chunks if (usage := json.loads(chunk)["usage"])]
    assert counts == [1, 2, 3] and json.loads(last)["usage"]["completion_tokens"] == 3 and done == "[DONE]"


def test_priorities_need_the_policy():
    with serving(FakeEngine(EngineConfig(scheduling_policy="priority"))) as served:
        assert served.post("/v1/completions", {"prompt": "a", "priority": -3}).status_code == 200
        assert served.engine.served[-1].priority == -3


def test_a_strict_server_refuses_unknown_fields():
    with serving(FakeEngine(), ServerOptions(strict=True)) as served:
        response = served.post("/v1/completions", {"prompt": "a", "tempratur": 1})
        assert response.status_code == 400 and response.json()["error"]["param"] == "tempratur"
        assert served.post("/v1/completions", {"prompt": "a", "user": "ann"}).status_code == 200


# ---------------------------------------------------------------------------- the operator's


def test_metrics_count_what_happened(served, name):
    def figures() -> dict:
        response = served.http.get("/metrics")
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain")
        families = text_string_to_metric_families(response.text)
        samples = [sample for family in families for sample in family.samples]
        assert all(sample.labels["model_name"] == name and sample.name.startswith("jaxllm:") for sample in samples)
        return {(sample.name, sample.labels.get("finished_reason"), sample.labels.get("le")): sample.value for sample in samples}

    before = figures()
    served.post("/v1/completions", {"prompt": "Once upon", "max_tokens": 5, "ignore_eos": True})
    after = figures()
    assert after["jaxllm:num_requests_running", None, None] == 0
    if name == "fake":
        return
    grown = {key[:2]: after[key] - before[key] for key in after if key[2] is None}
    assert grown["jaxllm:generation_tokens_total", None] == 5 and grown["jaxllm:request_success_total", "length"] == 1
    assert grown["jaxllm:inter_token_latency_seconds_count", None] == 4 and grown["jaxllm:time_to_first_token_seconds_count", None] == 1
    assert after["jaxllm:e2e_request_latency_seconds_bucket", None, "+Inf"] == after["jaxllm:e2e_request_latency_seconds_count", None, None]


def test_load_version_ping(served):
    assert shaped(shapes.LoadAnswer, served.http.get("/load")) == {"server_load": 0}
    shaped(shapes.VersionAnswer, served.http.get("/version"))
    shaped(shapes.Models, served.http.get("/v1/models"))
    assert served.http.get("/ping").status_code == served.http.post("/ping").status_code == 200


def test_the_operators_routes_are_closed_unless_asked_for():
    engine = FakeEngine()
    with serving(engine) as served:
        assert served.post("/reset_prefix_cache").status_code == 404
    with serving(engine, ServerOptions(enable_admin_routes=True, profile_dir="here")) as served:
        assert served.post("/stop_profile").status_code == 409
        assert served.post("/start_profile").status_code == 200 and engine.profiling == "here"
        assert served.post("/start_profile").json()["error"]["type"] == "ConflictError"
        assert served.post("/stop_profile").status_code == 200 and engine.profiling is None
        assert served.post("/reset_prefix_cache").status_code == 200 and engine.forgotten == 1


def test_an_error_in_any_stream_is_an_event_of_its_kind():
    with serving(FakeEngine()) as served:
        served.engine.fail_at = 3
        body = {"max_output_tokens": 9, "input": "a", "stream": True}
        with served.client() as client, pytest.raises(openai.APIError, match="has stopped"):
            list(client.responses.create(model="fake", input="a", stream=True))
        assert "event: error" in served.post("/v1/responses", body).text
        text = served.post("/v1/messages", {"messages": CHAT, "max_tokens": 9, "stream": True}).text
        assert text.rstrip().split("\n")[-2] == "event: error" and "has stopped" in text


def test_a_request_becomes_a_span():
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    seen = InMemorySpanExporter()
    with serving(FakeEngine(), ServerOptions(otlp_traces_endpoint="http://127.0.0.1:1/v1/traces")) as served:
        provider = trace.get_tracer_provider()
        assert isinstance(provider, TracerProvider)
        provider._active_span_processor._span_processors[0].shutdown()  # nobody listens at the endpoint
        provider.add_span_processor(SimpleSpanProcessor(seen))
        parent = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
        served.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 3, "seed": 1}, headers={"traceparent": parent})
    (span,) = [span for span in seen.get_finished_spans() if span.name == "llm_request"]
    assert span.parent is not None and span.context is not None and f"{span.context.trace_id:032x}" == "0123456789abcdef0123456789abcdef"
    assert span.attributes is not None and span.attributes["gen_ai.usage.output_tokens"] == 3


def test_every_schema_is_in_the_document(served):
    document = httpx.get(f"{served.url}/openapi.json").json()
    references = set(json.dumps(document).split('"#/components/schemas/')[1:])
    names = {reference.partition('"')[0] for reference in references}
    assert names <= document["components"]["schemas"].keys() and "CompletionBody" in names
    assert asyncio.iscoroutinefunction(served.app.state.context.memory.keep)
