"""The chat page in a browser: what is asked, stopped, kept, edited, refused and shown, and what the engine sees of it."""

import json
import re

import pytest
from fake_engine import FakeTokenizer
from page_fixtures import Scripted, answer_with, answers, ask, browsers, chromium, expect, send, watched
from server_fixtures import make_engine, serving, wait_until

from jaxllm.request import RequestError
from serving.options import ServerOptions

pytestmark = browsers


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def served():
    with serving(Scripted(max_model_len=4096)) as served:
        yield served


@pytest.fixture
def opened(browser, served):
    with watched(browser, served) as opened:
        yield opened


@pytest.fixture(scope="module")
def locked():
    with serving(Scripted(), ServerOptions(api_key=("secret",))) as served:
        yield served


def test_an_answer_is_shown_as_it_comes(opened, served):
    page = opened()
    served.engine.script, served.engine.step_s = "There was a dog. It had a kite, and the kite flew.", 0.02
    page.evaluate("""() => {
        window.seen = [];
        new MutationObserver(() => seen.push(document.querySelector(".assistant .text")?.textContent ?? ""))
            .observe(document.querySelector("#messages"), {subtree: true, childList: true, characterData: true});
    }""")
    page.get_by_role("button", name="Tell me a story about a dog and a kite.").click()
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(answers(page)).to_have_text(served.engine.script)
    seen = sorted(set(page.evaluate("seen")), key=len)
    assert len(seen) > 5 and all(served.engine.script.startswith(text) for text in seen)
    figures = page.locator(".figures").inner_text()
    speed = re.fullmatch(r"first token after \d+ ms · ([\d.]+) tokens/s · 50 tokens · prompt 58", figures)
    assert speed and 5 < float(speed[1]) < 51, figures
    assert served.engine.asked().endswith("<|im_start|>user\nTell me a story about a dog and a kite.<|im_end|><|im_start|>assistant\n")
    assert [said.inner_text() for said in page.locator("#spoken p").all()] == ["There was a dog.", "It had a kite, and the kite flew."]
    expect(page.locator("#status")).to_have_text("The answer is complete.")
    expect(page.locator("#room")).to_have_text("108 of 4,096 tokens used.")


@pytest.mark.parametrize("how", ["button", "escape", "closed"])
def test_what_is_stopped_the_engine_stops(opened, served, how):
    page = opened()
    served.engine.script, served.engine.step_s = "on and on, " * 300, 0.02
    send(page, "Go on")
    expect(page.locator(".assistant .text")).to_contain_text("on and")
    assert served.engine.running and not served.engine.aborted
    if how == "closed":
        page.close()
    elif how == "escape":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()
    wait_until(lambda: not served.engine.running)
    assert len(served.engine.aborted) == 1
    if how != "closed":
        expect(page.locator(".figures")).to_contain_text("stopped")
        expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
        assert served.engine.script.startswith(answers(page).inner_text())


def test_who_waits_is_told_how_long_and_for_whom(opened, served):
    page = opened()
    served.engine.script, served.engine.step_s = "x", 2.0
    send(page, "Hello")
    waiting = page.locator(".waiting")
    expect(waiting).to_have_text(re.compile(r"Waiting for the first token, \d{3} ms"))
    expect(waiting).to_have_text(re.compile(r"Waiting for the first token, 1\.\d s; on the server 1 run and 0 wait"))
    expect(answers(page)).to_have_text("x")
    expect(waiting).to_be_hidden()


def test_what_is_asked_before_the_server_is_known_waits_for_it(opened, served):
    page = opened("/page/icon.svg")
    held = []
    page.route("**/page/facts", lambda route: held.append(route))
    page.goto(served.url)
    send(page, "Early")
    expect(page.locator(".waiting")).to_be_visible()
    wait_until(lambda: page.locator("#status").inner_text() and held)
    assert not served.engine.served
    held[0].continue_()
    expect(answers(page)).to_have_count(1)


def test_it_works_under_a_proxys_prefix(opened, served):
    page = opened("/page/icon.svg")
    asked = []
    page.on("request", lambda request: asked.append(request.url.removeprefix(served.url)))
    page.route("**/here/**", lambda route: route.fulfill(response=route.fetch(url=route.request.url.replace("/here/", "/"))))
    page.goto(f"{served.url}/here/")
    ask(page)
    assert {"/here/", "/here/page/app.js", "/here/page/facts", "/here/v1/models", "/here/v1/chat/completions"} <= set(asked)
    assert all(path.startswith("/here/") for path in asked)


def test_what_is_deleted_while_it_is_answered_stays_deleted_unless_it_is_undone(opened, served):
    page = opened()
    served.engine.script, served.engine.step_s = "on and on, " * 300, 0.02
    for back in (False, True):
        send(page, "Go on")
        expect(page.locator(".assistant .text")).to_contain_text("on and")
        page.get_by_role("button", name="Delete the conversation").click()
        wait_until(lambda: not served.engine.running)
        if back:
            page.get_by_role("button", name="Undo").click()
            expect(page.locator(".figures")).to_contain_text("stopped")
        else:
            expect(page.locator("#toast")).to_contain_text("Deleted")
        page.goto(served.url + "/")
        expect(page.locator("#list a")).to_have_count(int(back))


def test_two_tabs_see_the_same_conversations(opened, served):
    page = opened()
    other = page.context.new_page()
    other.goto(served.url)
    ask(page, "From the first tab")
    other.get_by_role("link", name="From the first tab").click()
    expect(answers(other)).to_have_text(answers(page).inner_text())
    ask(other, "And the second")
    expect(answers(page)).to_have_count(2)
    page.get_by_role("button", name="Delete the conversation").click()
    expect(other.locator("#list a")).to_have_count(0)


def test_conversations_are_kept_renamed_and_deleted(opened, served):
    page = opened()
    ask(page, "The first one")
    first = answers(page).inner_text()
    page.reload()
    expect(answers(page)).to_have_text(first)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#welcome")).to_be_visible()
    ask(page, "The second one")
    page.goto(served.url + "/")  # without the conversation's address
    expect(page.locator(".message")).to_have_count(0)
    chats = page.get_by_role("navigation", name="Conversations")
    assert chats.get_by_role("link").all_inner_texts() == ["The second one", "The first one"]
    chats.get_by_role("link", name="The first one").click()
    expect(answers(page)).to_have_text(first)
    page.get_by_role("button", name="Rename").click()
    page.get_by_label("Name", exact=True).fill("Dogs & <b>kites</b>")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Dogs & <b>kites</b>")
    page.get_by_role("button", name="Delete the conversation").click()
    expect(chats.get_by_role("link")).to_have_text(["The second one"])
    page.get_by_role("button", name="Undo").click()
    expect(chats.get_by_role("link")).to_have_count(2)
    expect(answers(page)).to_have_text(first)
    page.reload()
    expect(page.get_by_role("heading", level=1)).to_have_text("Dogs & <b>kites</b>")


def test_what_is_exported_can_be_imported_and_a_bad_file_does_no_harm(opened, served, tmp_path):
    page = opened()
    ask(page, "Keep me")
    said = answers(page).inner_text()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    path = tmp_path / "exported.json"
    download.value.save_as(path)
    other = opened()
    picker = other.locator("#import-file")
    picker.set_input_files(path)
    expect(other.locator("#toast")).to_contain_text("1 imported.")
    other.get_by_role("link", name="Keep me").click()
    expect(answers(other)).to_have_text(said)
    picker.set_input_files(path)
    expect(other.locator("#toast")).to_contain_text("0 imported; 1 were here already.")
    hostile = json.loads(path.read_text())
    hostile["conversations"] = [
        {"id": "../../x", "messages": []},
        {
            "id": "0123456789abcdef",
            "title": {"a": 1},
            "messages": [{"role": "user", "content": 7}, {"role": "robot"}, None, {"role": "assistant", "calls": "x"}],
        },
        None,
    ]
    for text, told in (
        (json.dumps(hostile), "1 imported; 2 could not be read."),
        ("{", "holds no conversations"),
        ("[]", "holds no conversations"),
    ):
        path.write_text(text)
        picker.set_input_files(path)
        expect(other.locator("#toast")).to_contain_text(told)


def test_edit_and_regenerate_ask_again_from_there(opened, served):
    page = opened()
    for text, script in (("One", "first"), ("Two", "second"), ("Three", "third")):
        served.engine.script = script
        ask(page, text)
    assert "Two<|im_end|><|im_start|>assistant\nsecond<|im_end|>" in served.engine.asked()
    served.engine.script = "another third"
    page.get_by_role("button", name="Regenerate").last.click()
    expect(answers(page)).to_have_text(["first", "second", "another third"])
    assert served.engine.asked() == served.engine.asked(-2)
    served.engine.script = "new second"
    page.get_by_role("button", name="Edit").nth(1).click()
    page.get_by_label("Edit your message").fill("Zwei")
    page.get_by_role("button", name="Send again").click()
    expect(answers(page)).to_have_text(["first", "new second"])
    assert served.engine.asked().endswith("first<|im_end|><|im_start|>user\nZwei<|im_end|><|im_start|>assistant\n")
    page.get_by_role("button", name="Undo").click()
    expect(answers(page)).to_have_text(["first", "second", "another third"])
    served.engine.step_s = 0.05  # undone in the middle, and while another conversation is shown
    for elsewhere in (False, True):
        page.get_by_role("button", name="Regenerate").last.click()
        expect(page.locator(".message[aria-busy=true] .text")).not_to_be_empty()
        if elsewhere:
            page.get_by_role("button", name="New chat").click()
        page.get_by_role("button", name="Undo").click()
        wait_until(lambda: not served.engine.running)
        if elsewhere:
            expect(page.locator(".message")).to_have_count(0)
            page.get_by_role("link", name="One").click()
        expect(answers(page)).to_have_text(["first", "second", "another third"])
        expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    page.get_by_role("listitem").filter(has_text="Two").get_by_role("button", name="Delete").click()
    expect(page.locator(".message.user .bubble")).to_have_text(["One", "Three"])


def test_a_key_is_asked_for_and_kept_as_chosen(opened, locked):
    page = opened(at=locked)
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("The API key is missing or wrong")
    for key in ("wrong", "secret"):
        dialog.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
    expect(page.locator("#model-name")).to_have_text("fake")
    ask(page)
    keys = "() => [sessionStorage, localStorage].map(each => each.getItem('jaxllm.key'))"
    assert page.evaluate(keys) == ["secret", None]
    page.reload()
    expect(page.locator("#model-name")).to_have_text("fake")
    # Refused in the middle of a conversation: asked for again, and the message is answered.
    page.evaluate("() => sessionStorage.clear()")
    page.evaluate("async () => (await import('/page/api.js')).saveKey('old')")
    send(page, "Again")
    dialog.get_by_label("API key").fill("secret")
    dialog.get_by_label("Keep it in this browser").check()
    page.get_by_role("button", name="Use this key").click()
    expect(answers(page)).to_have_count(2)
    assert page.evaluate(keys) == [None, "secret"]


def test_what_goes_wrong_is_said_in_the_servers_words(opened, served):
    page = opened()
    error = page.locator(".error")
    again = page.get_by_role("button", name="Try again")
    served.engine.queue_full = True  # 429
    send(page, "Hello")
    expect(error).to_contain_text("the queue is full")
    expect(page.get_by_role("button", name="Try again in 1 s")).to_be_disabled()
    served.engine.queue_full = False
    served.engine.script, served.engine.fail_at = "A few words, then nothing", 5  # an error in the middle
    again.click()
    expect(error).to_contain_text("The engine has stopped")
    expect(page.locator(".assistant .text")).to_have_text("A few")
    served.engine.fail_at = None
    answer_with(page, {"content": "Half of"}, done=False)  # the connection is lost
    again.click()
    expect(error).to_contain_text("The connection to the server was lost")
    expect(page.locator(".assistant .text")).to_have_text("Half of")
    page.route("**/v1/chat/completions", lambda route: route.abort(), times=1)
    again.click()
    expect(error).to_contain_text("The server cannot be reached")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("9")  # 400
    page.get_by_role("button", name="Close", exact=True).click()
    again.click()
    expect(error).to_contain_text("temperature must be from 0")
    page.reload()
    expect(error).to_contain_text("temperature must be from 0")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("")
    page.keyboard.press("Escape")
    again.click()
    expect(answers(page)).to_have_text("A few words, then nothing")
    expect(error).to_be_hidden()


def test_the_settings_reach_the_engine(opened, served):
    served.engine.default_params = {"temperature": 0.6}
    page = opened()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Temperature")).to_have_attribute("placeholder", "0.6")
    given = {
        "Temperature": "0.7",
        "Top p": "0.9",
        "Top k": "12",
        "Min p": "0.02",
        "Max tokens": "9",
        "Seed": "4",
        "Presence penalty": "-0.5",
    }
    given |= {"Frequency penalty": "0.25", "Repetition penalty": "1.1", "System prompt": "Be brief.", "Stop strings": "zz\nqq"}
    for label, value in given.items():
        page.get_by_label(label).fill(value)
    page.get_by_label("Further fields").fill('{"min_tokens": 2}')
    page.get_by_role("button", name="Close", exact=True).click()
    ask(page)
    expect(page.locator(".figures")).to_contain_text("9 tokens · prompt")
    expect(page.locator(".figures")).to_contain_text("ended at the token limit")
    params = served.engine.served[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.max_tokens, params.seed) == (0.7, 0.9, 12, 0.02, 9, 4)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (-0.5, 0.25, 1.1)
    assert params.stop == ("zz", "qq") and params.min_tokens == 2
    assert "<|im_start|>system\nBe brief.<|im_end|>" in served.engine.asked()
    page.reload()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("System prompt")).to_have_value("Be brief.")
    page.get_by_label("Further fields").fill("[1]")
    page.keyboard.press("Escape")
    send(page, "Again")
    expect(page.get_by_role("alert")).to_have_text("The further fields must be one JSON object.")
    page.get_by_role("button", name="Back to the server's defaults").click()
    page.keyboard.press("Escape")
    expect(page.get_by_label("Message", exact=True)).to_have_value("Again")
    page.get_by_role("button", name="Send", exact=True).click()
    expect(answers(page)).to_have_count(2)
    assert served.engine.served[-1].params.temperature == 0.6 and served.engine.served[-1].params.stop == ()


def test_an_answer_that_was_cut_off_is_continued(opened, served):
    page = opened()
    served.engine.script = "It was a dark and"
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Max tokens").fill("200")
    page.keyboard.press("Escape")
    ask(page, "Begin")
    expect(page.get_by_role("button", name="Continue")).to_be_hidden()
    served.engine.fail_at = 9
    page.get_by_role("button", name="Regenerate").click()
    expect(answers(page)).to_have_text("It was a")
    served.engine.script, served.engine.fail_at = "stormy night.", None
    page.get_by_role("button", name="Continue").click()
    expect(answers(page)).to_have_text("It was a stormy night.")
    assert served.engine.asked().endswith("user\nBegin<|im_end|><|im_start|>assistant\nIt was a ")
    assert [said.inner_text() for said in page.locator("#spoken p").all()] == ["stormy night."]


class NoTemplate(FakeTokenizer):
    def chat(self, *_, **__):
        raise RequestError("this model has no chat template", "messages")


def test_a_model_that_does_not_chat_continues_texts(opened, served):
    served.engine.tokenizer, before = NoTemplate(), served.engine.tokenizer
    page = opened()
    expect(page.locator("#banner")).to_contain_text("does not chat (this model has no chat template)")
    served.engine.script = " upon a time"
    ask(page, "Once")
    ask(page, " there")
    assert served.engine.asked() == "<s>Once upon a time there"
    assert served.engine.served[-1].params.max_tokens == 256
    served.engine.tokenizer = before


def test_a_real_model_says_on_the_page_what_it_says_to_others(opened):
    engine = make_engine("real")
    try:
        with serving(engine) as served:
            page = opened(at=served)
            page.get_by_role("button", name="Settings").click()
            page.get_by_label("Temperature").fill("0")
            page.get_by_label("Max tokens").fill("20")
            page.keyboard.press("Escape")
            ask(page, "Once upon a time")
            body = {"messages": [{"role": "user", "content": "Once upon a time"}], "temperature": 0, "max_tokens": 20}
            text = served.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
            expect(answers(page)).to_have_text(text.strip())
            expect(page.locator(".figures")).to_contain_text(" tokens/s · 20 tokens · prompt ")
    finally:
        engine.close()


def test_a_full_storage_is_said_and_loses_nothing_on_the_page(opened, served):
    page = opened()
    page.evaluate("() => localStorage.setItem('jaxllm.conversation.0000000000000000', 'x'.repeat(4_000_000))")
    ask(page)
    expect(page.locator("#banner")).to_contain_text("storage is full")
    expect(answers(page)).to_have_count(1)
