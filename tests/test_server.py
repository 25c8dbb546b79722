"""What people do with the openai package, unchanged, over a real socket. Every test holds for the fake engine and for the real one."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import openai
import pytest
from server_fixtures import ENGINES, make_engine, read_event, serving, wait_until

GOLDENS = Path(__file__).parent / "goldens"
CHAT = [{"role": "user", "content": "Tell me a story"}]


@pytest.fixture(scope="module", params=ENGINES)
def served(request):
    engine = make_engine(request.param)
    try:
        with serving(engine) as served:
            yield served
    finally:
        engine.close()


@pytest.fixture(scope="module")
def client(served):
    with served.client() as client:
        yield client


@pytest.fixture(scope="module")
def name(served):
    return served.engine.model_name


def complete(client, name, **options):
    return client.completions.create(**{"model": name, "prompt": "Once upon a time", "temperature": 0, "max_tokens": 12, **options})


def chat(client, name, **options):
    return client.chat.completions.create(**{"model": name, "messages": CHAT, "temperature": 0, "max_tokens": 12, **options})


def test_models_are_listed(client, served, name):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (name, "model", "jaxllm")
    assert model.max_model_len == served.engine.max_model_len
    assert model.root == str(served.engine.model_path) and model.permission[0]["allow_sampling"]
    assert client.models.retrieve(name).id == name


def test_completion(client, name):
    answer = complete(client, name)
    assert answer.object == "text_completion" and answer.model == name and answer.id.startswith("cmpl-")
    (choice,) = answer.choices
    assert choice.text and choice.finish_reason == "length" and choice.logprobs is None and choice.stop_reason is None
    usage = answer.usage
    assert usage.completion_tokens == 12 and usage.total_tokens == usage.prompt_tokens + 12 and usage.prompt_tokens > 1
    assert answer.system_fingerprint.startswith("jaxllm-")


def test_completion_makes_16_tokens_by_default_and_the_model_may_be_left_out(served):
    body = {"prompt": "Once upon a time", "temperature": 0, "ignore_eos": True}
    assert served.post("/v1/completions", body).json()["usage"]["completion_tokens"] == 16


def test_chat(client, name):
    answer = chat(client, name)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content and choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 12


def test_chat_fills_the_context_by_default(client, served, name):
    answer = chat(client, name, max_tokens=None, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == served.engine.max_model_len and answer.choices[0].finish_reason == "length"


def test_max_tokens_is_clamped_to_what_fits(client, served, name):
    answer = complete(client, name, max_tokens=10**6, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == served.engine.max_model_len


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_chat_takes_both_names_of_the_limit(client, name, field):
    assert chat(client, name, **{"max_tokens": openai.omit, field: 3}).usage.completion_tokens == 3


def test_content_may_be_text_parts(client, name):
    parts = [{"type": "text", "text": "Tell me"}, {"type": "text", "text": "a story"}]
    both = [chat(client, name, messages=[{"role": "user", "content": content}]) for content in (parts, "Tell me\na story")]
    assert both[0].choices[0].message.content == both[1].choices[0].message.content


def test_streamed_completion_says_the_same(client, name):
    whole = complete(client, name)
    chunks = list(complete(client, name, stream=True))
    assert len(chunks) == 12  # one a token
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 11 + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1 and all(chunk.usage is None for chunk in chunks)


def test_streamed_chat_says_the_same(client, name):
    whole = chat(client, name)
    first, *chunks = chat(client, name, stream=True)
    assert first.choices[0].delta.role == "assistant" and first.choices[0].delta.content == ""
    assert len(chunks) == 12 and all(chunk.choices[0].delta.role is None for chunk in chunks)
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_stream_includes_usage_when_asked(client, name):
    *chunks, last = chat(client, name, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage.completion_tokens == 12 and last.usage.prompt_tokens > 1
    assert all(chunk.usage is None for chunk in chunks)


def test_stream_ends_with_done_and_says_usage_null_before(served):
    *chunks, last, done = served.events("/v1/completions", {"prompt": "Hi", "max_tokens": 3, "stream_options": {"include_usage": True}})
    assert done == "[DONE]" and json.loads(last)["usage"]["completion_tokens"] == 3
    assert all(json.loads(chunk)["usage"] is None for chunk in chunks)


def test_async_client_streams(served, name):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="any") as client:
            return [chunk async for chunk in await client.completions.create(model=name, prompt="Hi", max_tokens=3, stream=True)]

    import asyncio

    assert len(asyncio.run(run())) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_text_before_it(client, name, stream):
    text = complete(client, name).choices[0].text
    stop = text[4:7]
    answer = complete(client, name, stop=[stop, "never to be found"], stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
    assert choices[-1].finish_reason == "stop" and choices[-1].stop_reason == stop


def test_stop_string_can_be_kept(client, name):
    text = complete(client, name).choices[0].text
    stop = text[4:7]
    answer = complete(client, name, stop=stop, extra_body={"include_stop_str_in_output": True})
    assert answer.choices[0].text == text[: text.index(stop) + 3]


def test_bias_forces_a_token_and_a_stop_token_ends(client, served, name):
    token = served.engine.tokenizer.encode("x", add_special_tokens=False)[-1]
    answer = complete(client, name, logit_bias={str(token): 100}, max_tokens=3)
    assert answer.choices[0].text.strip() == (served.engine.tokenizer.token_text(token) * 3).strip()
    answer = complete(client, name, logit_bias={str(token): 100}, extra_body={"stop_token_ids": [token]})
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].stop_reason == token and answer.usage.completion_tokens == 1


@pytest.mark.parametrize("stream", [False, True])
def test_two_choices_differ_and_are_reproduced_by_their_seed(client, name, stream):
    def texts():
        answer = chat(client, name, n=2, temperature=1, seed=7, max_tokens=24, stream=stream)
        if not stream:
            assert [choice.index for choice in answer.choices] == [0, 1]
            return [choice.message.content for choice in answer.choices]
        parts = {0: "", 1: ""}
        for chunk in answer:
            parts[chunk.choices[0].index] += chunk.choices[0].delta.content
        return [parts[0], parts[1]]

    first = texts()
    assert first[0] != first[1] and texts() == first


def test_a_list_of_prompts_has_its_choices_in_order(client, name):
    prompts = ["Once upon a time", "There was a big dog", "One day"]
    alone = [complete(client, name, prompt=prompt) for prompt in prompts]
    together = complete(client, name, prompt=prompts, n=2)
    assert [choice.index for choice in together.choices] == list(range(6))
    assert [choice.text for choice in together.choices[::2]] == [answer.choices[0].text for answer in alone]
    assert together.usage.prompt_tokens == sum(answer.usage.prompt_tokens for answer in alone)
    assert together.usage.completion_tokens == 2 * sum(answer.usage.completion_tokens for answer in alone)
    streamed = [""] * 6
    for chunk in complete(client, name, prompt=prompts, n=2, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in together.choices]


def test_prompts_may_be_token_ids(client, served, name):
    ids = served.engine.tokenizer.encode("Once upon a time")
    text = complete(client, name).choices[0].text
    assert complete(client, name, prompt=ids).choices[0].text == text
    assert [choice.text for choice in complete(client, name, prompt=[ids, ids]).choices] == [text, text]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_gives_the_prompt_back(client, served, name, stream):
    text = complete(client, name).choices[0].text
    answer = complete(client, name, echo=True, stream=stream)
    assert ("".join(c.choices[0].text for c in answer) if stream else answer.choices[0].text) == "Once upon a time" + text


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs(client, name, stream):
    answer = complete(client, name, logprobs=2, max_tokens=5, stream=stream)
    bodies = [c.choices[0].logprobs for c in answer if c.choices[0].logprobs] if stream else [answer.choices[0].logprobs]
    tokens = [token for body in bodies for token in body.tokens]
    assert len(tokens) == 5 and sum(len(body.token_logprobs) for body in bodies) == 5
    assert all(value <= 0 for body in bodies for value in body.token_logprobs)
    starts = [sum(len(token) for token in tokens[:i]) for i in range(5)]
    assert [offset for body in bodies for offset in body.text_offset] == starts
    for token, top in zip(tokens, (top for body in bodies for top in body.top_logprobs), strict=True):
        assert token in top and 1 <= len(top) <= 3
        assert top[token] == max(top.values())  # greedy


def test_echo_with_logprobs_scores_the_prompt_without_generating(client, served, name):
    ids = served.engine.tokenizer.encode("Once upon a time")
    options = {"prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 0}
    answer = complete(client, name, **options)
    body = answer.choices[0].logprobs
    streamed = list(complete(client, name, **options, stream=True))
    assert streamed[0].choices[0].logprobs == body and streamed[0].choices[0].text == answer.choices[0].text == "Once upon a time"
    assert streamed[-1].choices[0].finish_reason == "length" and "".join(chunk.choices[0].text for chunk in streamed[1:]) == ""
    assert len(body.tokens) == len(ids) and answer.usage.completion_tokens == 0 and answer.choices[0].finish_reason == "length"
    assert body.token_logprobs[0] is None and body.top_logprobs[0] is None and all(value <= 0 for value in body.token_logprobs[1:])


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client, name, stream):
    answer = chat(client, name, logprobs=True, top_logprobs=2, max_tokens=5, stream=stream)
    bodies = [c.choices[0].logprobs for c in answer if c.choices[0].logprobs] if stream else [answer.choices[0].logprobs]
    entries = [entry for body in bodies for entry in body.content]
    assert len(entries) == 5
    for entry in entries:
        assert entry.logprob <= 0 and bytes(entry.bytes).decode(errors="replace") == entry.token
        assert len(entry.top_logprobs) == 2 and entry.top_logprobs[0].token == entry.token  # greedy


def test_a_prompt_of_one_token_can_be_scored(client, served, name):
    ids = served.engine.tokenizer.encode("a")[:1]
    answer = complete(client, name, prompt=ids, echo=True, logprobs=1, max_tokens=2)
    assert len(answer.choices[0].logprobs.tokens) == 3 and answer.choices[0].logprobs.token_logprobs[0] is None


def test_chat_logprobs_without_top(client, name):
    entries = chat(client, name, logprobs=True, max_tokens=2).choices[0].logprobs.content
    assert len(entries) == 2 and all(entry.top_logprobs == [] for entry in entries)


def test_prompt_logprobs(client, served, name):
    answer = complete(client, name, extra_body={"prompt_logprobs": 1})
    entries = answer.choices[0].prompt_logprobs
    ids = served.engine.tokenizer.encode("Once upon a time")
    assert entries[0] is None and len(entries) == len(ids)
    for token, entry in zip(ids[1:], entries[1:], strict=True):
        assert set(entry[str(token)]) == {"logprob", "rank", "decoded_token"} and entry[str(token)]["rank"] >= 1


def test_continuing_the_last_message(client, served, name):
    messages = [*CHAT, {"role": "assistant", "content": "Once upon"}]
    goes_on = chat(client, name, messages=messages, extra_body={"continue_final_message": True})
    assert goes_on.usage.prompt_tokens < chat(client, name, messages=messages).usage.prompt_tokens


def test_unknown_model(client):
    with pytest.raises(openai.NotFoundError, match=r"The model `gpt-4` does not exist\.") as caught:
        complete(client, "gpt-4")
    assert caught.value.type == "NotFoundError" and caught.value.param == "model"


@pytest.mark.parametrize("stream", [False, True])
def test_too_long_prompt_is_refused_with_both_numbers(client, served, name, stream):
    ids = served.engine.tokenizer.encode("a") * served.engine.max_model_len
    with pytest.raises(openai.BadRequestError, match=f"{len(ids)} tokens.*{served.engine.max_model_len} tokens") as caught:
        complete(client, name, prompt=ids, stream=stream)
    assert caught.value.code == "context_length_exceeded"


def test_the_longest_prompt_leaves_room_for_one_token(client, served, name):
    token = served.engine.tokenizer.encode("a")[-1]
    answer = complete(client, name, prompt=[token] * (served.engine.max_model_len - 1))
    assert answer.usage.completion_tokens == 1


def test_ids_outside_the_vocabulary_are_refused(client, served, name):
    beyond = served.engine.vocab_size
    for options in ({"prompt": [beyond]}, {"logit_bias": {str(beyond): 1}}, {"extra_body": {"stop_token_ids": [beyond]}}):
        with pytest.raises(openai.BadRequestError, match=str(beyond)):
            complete(client, name, **options)


def test_more_logprobs_than_the_server_allows_are_refused(client, served, name):
    with pytest.raises(openai.BadRequestError, match=str(served.engine.config.max_logprobs)):
        complete(client, name, logprobs=served.engine.config.max_logprobs + 1)


def test_one_bad_prompt_refuses_all(client, served, name):
    with pytest.raises(openai.BadRequestError):
        complete(client, name, prompt=[[1, 2], [served.engine.vocab_size]])


def nothing_held(engine):
    stats = engine.stats()
    return stats.held == stats.running == stats.waiting == 0 and stats.free + stats.cached == stats.pages


def test_200_clients_that_vanish_leave_nothing_held(served, client, name):
    body = {"prompt": "Once upon a time", "max_tokens": 250, "ignore_eos": True, "stream": True}
    for _ in range(4):
        with ExitStack() as connections:
            first, *_ = [connections.enter_context(served.open("/v1/completions", body)) for _ in range(50)]
            read_event(first)  # some are answered by now, and some wait for a row
    wait_until(lambda: nothing_held(served.engine), 10)
    assert complete(client, name).choices[0].text  # and it goes on


def test_64_streams_of_many_lengths_all_end(served):
    lengths = [1 + i * 37 % 60 for i in range(64)]

    def run(i):
        body = {"prompt": f"Once {i}", "max_tokens": lengths[i], "ignore_eos": True, "stream_options": {"include_usage": True}}
        *_, usage, done = served.events("/v1/completions", body)
        return json.loads(usage)["usage"]["completion_tokens"], done

    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(run, range(64))) == [(length, "[DONE]") for length in lengths]
    wait_until(lambda: nothing_held(served.engine))


def test_health_and_version(served):
    assert served.http.get("/health").status_code == 200
    assert served.http.get("/version").json()["version"]


def test_the_story_through_http_beside_seven_other_prompts(served, client, name):
    """What llama2.c's arithmetic gives for the same weights, word for word, whoever else is in the batch."""
    if name == "fake":
        pytest.skip("only the real model knows the story")
    story = (GOLDENS / "stories260k.txt").read_text().split("\n", 1)[1].strip()
    others = ["The cat", "A dog", "Lily and Tom", "One day", "Mom said", "He ran", "She"]

    def ask(prompt: str) -> str:
        return client.completions.create(model=served.engine.model_name, prompt=prompt, max_tokens=200, temperature=0).choices[0].text

    with ThreadPoolExecutor(8) as pool:
        first, *_ = pool.map(ask, ["Once upon a time", *others])
    assert ("Once upon a time" + first).startswith(story)
