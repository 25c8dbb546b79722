"""The chat page: its files and headers by HTTP, and the page itself in Debian's Chromium, driven by Playwright over a real socket.

Every browser test also fails if the page logs an error, or asks anything of another origin.
"""

import importlib.util
import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from fake_engine import FakeEngine, FakeTokenizer
from server_fixtures import make_engine, serving, wait_until

from jaxllm.request import Completion, RequestError
from serving.options import ServerOptions
from serving.routes import page as page_route

ROOT = Path(__file__).parent.parent
FILES = sorted(path for path in page_route.FOLDER.iterdir())
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browsers = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="needs playwright's Python package and a Chromium on the PATH (Debian: apt-get install chromium)",
)
# Long enough for a busy machine; a test that passes waits for no longer than it must.
PATIENCE_MS = 15_000


class Scripted(FakeEngine):
    """Says what it is told to, a character a token; without a script it makes something up, as FakeEngine does."""

    script: str | None = None

    def _step(self, request, run, salt):
        if self.script is None:
            return super()._step(request, run, salt)
        at = len(run.ids)
        run.ids.append(0)
        run.done = at + 1 >= len(self.script)
        return Completion(run.index, self.script[at], (0,), None, "stop" if run.done else None, None)

    def asked(self, which: int = -1) -> str:
        """The prompt of a request, as text."""
        return self._words.decode(self.served[which].prompt_token_ids, skip_special_tokens=False)


# Files and headers


@pytest.fixture(scope="module")
def plain():
    with serving(FakeEngine(), ServerOptions(api_key=("secret",))) as served:
        yield served


def test_every_file_is_served_without_a_key_and_with_its_type(plain):
    kinds = {
        "html": "text/html; charset=utf-8",
        "css": "text/css; charset=utf-8",
        "js": "text/javascript; charset=utf-8",
        "svg": "image/svg+xml",
    }
    for path in FILES:
        address = "/" if path.name == "index.html" else f"/page/{path.name}"
        response = plain.http.get(address)
        assert response.status_code == 200 and response.content == path.read_bytes(), path
        assert response.headers["content-type"] == kinds[path.suffix[1:]]
        assert response.headers["x-content-type-options"] == "nosniff" and response.headers["cache-control"] == "no-cache"
        bare = plain.http.head(address)
        assert bare.status_code == 200 and not bare.content and bare.headers["content-length"] == str(path.stat().st_size)


def test_a_file_that_is_known_is_not_sent_again(plain):
    first = plain.http.get("/page/app.js")
    for tag in (first.headers["etag"], f'"other", W/{first.headers["etag"]}'):
        again = plain.http.get("/page/app.js", headers={"if-none-match": tag})
        assert again.status_code == 304 and not again.content and again.headers["etag"] == first.headers["etag"]
    assert plain.http.get("/page/app.js", headers={"if-none-match": '"other"'}).status_code == 200


def test_the_policy_lets_nothing_in_from_elsewhere(plain):
    said = plain.http.get("/").headers["content-security-policy"]
    policy = {name: set(sources) for name, *sources in (part.split() for part in said.split(";"))}
    assert policy["default-src"] == {"'none'"} and policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == {"'none'"}
    assert set().union(*policy.values()) <= {"'none'", "'self'", "'script'"}, "no host, no inline, no eval"
    assert policy["require-trusted-types-for"] == {"'script'"} and policy["trusted-types"] == {"'none'"}


def test_only_the_files_are_open(plain):
    for address in ("/page/facts", "/page/none.js", "/page/..%2fapp.py", "/page/", "/page/index.html/", "/v1/models", "/metrics"):
        assert plain.http.get(address).status_code == 401, address
    key = {"authorization": "Bearer secret"}
    for address in ("/page/none.js", "/page/..%2fapp.py", "/page/%2e%2e/app.py", "/page/"):
        assert plain.http.get(address, headers=key).status_code == 404, address
    assert plain.http.post("/", headers=key).status_code == 405


def test_what_the_page_asks_about_the_model():
    engine = FakeEngine()
    engine.default_params = {"temperature": 0.6, "max_tokens": 99}
    with serving(engine) as served:
        facts = served.http.get("/page/facts").json()
        assert facts["model"] == "fake" and facts["max_model_len"] == 256 and facts["chat_refused"] is None
        assert facts["defaults"] == {
            **{"temperature": 0.6, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": 99, "seed": None},
            **{"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0},
        }
        engine.tokenizer = None
        assert "without a tokenizer" in served.http.get("/page/facts").json()["chat_refused"]
        engine.default_params = {}
        assert served.http.get("/page/facts").json()["defaults"]["max_tokens"] is None, "as many as fit"


def test_it_can_be_switched_off():
    with serving(FakeEngine(), ServerOptions(disable_page=True)) as served:
        assert [served.http.get(address).status_code for address in ("/", "/page/app.js", "/page/facts")] == [404] * 3
        assert served.http.get("/v1/models").status_code == 200
    with serving(FakeEngine(), ServerOptions(disable_page=True, api_key=("secret",))) as served:
        assert served.http.get("/").status_code == 401


def test_all_of_it_is_in_the_package():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["serving"]
    packed = {path.name for pattern in data for path in (ROOT / "serving").glob(pattern)}
    assert packed == {path.name for path in FILES} == set(page_route.NAMES)
    assert sum(path.stat().st_size for path in FILES) < 120_000, "a page that loads at once"


def test_nothing_is_inline_and_nothing_is_missing():
    html = (page_route.FOLDER / "index.html").read_text()
    assert not re.findall(r"<style|\sstyle=|\son\w+=|javascript:|<script(?![^>]*\ssrc=)", html)
    wanted = set(re.findall(r'(?:src|href)="page/([^"]+)"', html))
    for script in page_route.FOLDER.glob("*.js"):
        wanted |= set(re.findall(r'from "\./([^"]+)"', script.read_text()))
        assert not re.findall(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|https?://(?!www\.w3\.org)\w", script.read_text()
        )
    assert wanted == {path.name for path in FILES} - {"index.html"}


# In a browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        # As root, as in most containers, Chromium's own sandbox cannot be had.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served():
    with serving(Scripted(max_model_len=4096)) as served:
        yield served


@pytest.fixture(scope="module")
def locked():
    with serving(Scripted(), ServerOptions(api_key=("secret",))) as served:
        yield served


@pytest.fixture
def opened(browser, served):
    """Opens the page in a browser that has never seen it; afterwards nothing may have gone wrong behind it."""
    contexts, wrong = [], []
    engine = served.engine
    engine.script, engine.step_s, engine.queue_full, engine.fail_at = None, 0.0, False, None
    engine.served.clear()
    engine.aborted.clear()

    def open_page(path: str = "/", at=served, **options):
        context = browser.new_context(**{"viewport": {"width": 1100, "height": 700}, **options})
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        # That an answer has a status of 400 or more the browser logs by itself.
        page.on("console", lambda said: said.type in ("error", "warning") and "Failed to load" not in said.text and wrong.append(said.text))
        page.on("request", lambda asked: asked.url.startswith((at.url, "blob:")) or wrong.append(f"a request to {asked.url}"))
        page.goto(at.url + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def expect(locator):
    from playwright.sync_api import expect

    expect.set_options(timeout=PATIENCE_MS)
    return expect(locator)


def send(page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answers(page):
    return page.locator(".assistant[aria-busy=false] .text")


def ask(page, text: str = "Hello") -> None:
    """Sends, and waits for the answer."""
    count = page.locator(".assistant").count()
    send(page, text)
    expect(answers(page)).to_have_count(count + 1)


@browsers
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


@browsers
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
        expect(page.get_by_role("button", name="Send", exact=True)).to_be_focused() if how == "button" else None
        assert served.engine.script.startswith(answers(page).inner_text())


@browsers
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


@browsers
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


@browsers
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
    page.get_by_role("listitem").filter(has_text="Two").get_by_role("button", name="Delete").click()
    expect(page.locator(".message.user .bubble")).to_have_text(["One", "Three"])


@browsers
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


HOSTILE = [
    "<img src=x onerror='window.pwned=1'>",
    "<script>window.pwned=1</script>",
    "<svg onload=window.pwned=1></svg>",
    "[link](javascript:window.pwned=1)",
    "[link](JaVaScRiPt:window.pwned=1)",
    "[link](java\tscript:window.pwned=1)",
    "[link](data:text/html,<script>window.pwned=1</script>)",
    "[link](//evil.example/x)",
    "[link](vbscript:x)",
    "![picture](https://evil.example/pixel.png)",
    '[link](https://ok.example/"onmouseover="window.pwned=1)',
    "<https://ok.example/><iframe src=https://evil.example>",
    "`<img src=x onerror=window.pwned=1>`",
    '```"><script>window.pwned=1</script>\n</code></pre><script>window.pwned=1</script>\n```',
    "| <img src=x onerror=window.pwned=1> | b |\n|---|---|\n| <b>x</b> | y |",
    "# <img src=x onerror=window.pwned=1>",
    "**<img src=x onerror=window.pwned=1>**",
    "<think><img src=x onerror=window.pwned=1></think>",
]


@browsers
def test_hostile_text_stays_text(opened, served):
    page = opened()
    served.engine.script = "\n\n".join(HOSTILE)
    ask(page, HOSTILE[0])
    expect(answers(page)).to_contain_text("<script>window.pwned=1</script>")
    page.locator(".assistant").hover()
    assert page.evaluate("window.pwned") is None
    assert page.locator(".message :is(img, script, iframe, svg, object, embed, style, form, base)").count() == 0
    for link in page.locator(".message a").all():
        assert re.match(r"https://(ok|evil)\.example/", link.get_attribute("href") or "")
        assert link.get_attribute("rel") == "noopener noreferrer nofollow" and link.get_attribute("target") == "_blank"
    attributes = page.evaluate("[...new Set([...document.querySelectorAll('.text *')].flatMap(e => e.getAttributeNames()))]")
    assert set(attributes) <= {"href", "target", "rel", "class", "tabindex", "role", "aria-label", "type", "start"}
    expect(page.locator(".bubble")).to_have_text(HOSTILE[0])


MARKDOWN = {
    "plain": "<p>plain</p>",
    "one\ntwo\n\nthree": "<p>one<br>two</p><p>three</p>",
    "# Big\n### Small ##": "<h3>Big</h3><h5>Small</h5>",
    "a **b** *c* __d__ _e_ ***f*** ~~g~~": "<p>a <strong>b</strong> <em>c</em> <strong>d</strong> <em>e</em> <strong><em>f</em></strong> <del>g</del></p>",
    "2 * 3 * 4 and snake_case_name and **open": "<p>2 * 3 * 4 and snake_case_name and **open</p>",
    "**bold with *italic* inside**": "<p><strong>bold with <em>italic</em> inside</strong></p>",
    r"\*not\* `a*b*` ``c`d``": "<p>*not* <code>a*b*</code> <code>c`d</code></p>",
    "- a\n- b\n  - c\n\n  more b\n- d": "<ul><li>a</li><li>b<ul><li>c</li></ul><p>more b</p></li><li>d</li></ul>",
    "3. x\n4. y\n\ntext": '<ol start="3"><li>x</li><li>y</li></ol><p>text</p>',
    "> quote\n> more\n\n---": "<blockquote><p>quote<br>more</p></blockquote><hr>",
    "see https://a.example/b_c_d. (https://c.example)": '<p>see <a>https://a.example/b_c_d</a>. (<a>https://c.example</a>)</p>',
    "[a *b*](https://c.example/(d))": "<p><a>a <em>b</em></a></p>",
    "| a | b |\n|--:|---|\n| 1 | `x` |\nend": '<table><thead><tr><th class="right">a</th><th>b</th></tr></thead>'
    '<tbody><tr><td class="right">1</td><td><code>x</code></td></tr></tbody></table><p>end</p>',
    "```py\nif a:\n    <b>\n```\nafter": "<pre><code>if a:\n    &lt;b&gt;</code></pre><p>after</p>",
    "~~~\nopen": "<pre><code>open</code></pre>",
}  # fmt: skip
RENDER = """async (texts) => {
    const { Markdown } = await import("/page/markdown.js");
    const shown = (text, steps) => {
        const root = document.createElement("div"), markdown = new Markdown(root);
        for (let i = 1; i < steps; i += 1) markdown.show(text.slice(0, (text.length * i) / steps));
        markdown.show(text);
        root.querySelectorAll(".code-head").forEach((head) => head.remove());
        root.querySelectorAll(".code, .wide-table").forEach((box) => box.replaceWith(...box.childNodes));
        root.querySelectorAll("pre, a").forEach((e) => e.getAttributeNames().forEach((name) => e.removeAttribute(name)));
        return root.innerHTML;
    };
    return texts.map(([text, steps]) => shown(text, steps));
}"""


@browsers
def test_markdown_means_what_it_should_all_at_once_or_letter_by_letter(opened):
    page = opened()
    for text, meant in MARKDOWN.items():
        assert page.evaluate(RENDER, [[text, 1], [text, len(text)]]) == [meant, meant]
    whole = "\n\n".join(MARKDOWN)
    once, grown = page.evaluate(RENDER, [[whole, 1], [whole, 200]])
    assert once == grown


@browsers
def test_no_text_takes_long(opened):
    """30,000 characters of what could make a careless pattern go back and forth, in a second each."""
    page = opened()
    parts = [
        "*",
        "**a",
        "_a ",
        "`",
        "``a",
        "[",
        "[a](",
        "![",
        "> ",
        "- ",
        "# ",
        "|",
        "|-",
        " ",
        "~~",
        "\\",
        "a|b\n-|-\n",
        "1. \n",
        "***",
        "https://a",
        "(",
        "[a](b ",
    ]
    took = page.evaluate(
        """async (parts) => {
            const { Markdown } = await import("/page/markdown.js");
            return parts.map((part) => {
                const root = document.createElement("div"), start = performance.now();
                new Markdown(root).show("x " + part.repeat(30000 / part.length) + " y");
                new Markdown(root).show(part.repeat(30000 / part.length));
                return performance.now() - start;
            });
        }""",
        parts,
    )
    slow = {part: ms for part, ms in zip(parts, took, strict=True) if ms > 1000}
    assert not slow


def answer_with(page, *deltas: dict, done: bool = True) -> None:
    """Has the page's next chat answered by these deltas."""
    lines = [f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta, 'finish_reason': None}]})}\n\n" for delta in deltas]
    body = "".join(lines) + "data: [DONE]\n\n" * done
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, headers={"content-type": "text/event-stream"}), times=1)


@browsers
@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_is_folded_and_tool_calls_are_shown(opened, name):
    page = opened()
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "get_weather", "arguments": ""}}
    pieces = [{"tool_calls": [{"index": 0, "function": {"arguments": text}}]} for text in ('{"city": "Pa', 'ris"}')]
    answer_with(page, {name: "Let me "}, {name: "think."}, {"content": "I will look."}, {"tool_calls": [call]}, *pieces)
    ask(page)
    expect(answers(page)).to_have_text("I will look.")
    expect(page.locator(".thought")).to_be_hidden()
    page.get_by_text("Reasoning", exact=True).click()
    expect(page.locator(".thought")).to_have_text("Let me think.")
    expect(page.locator(".call figcaption")).to_have_text("Calls get_weather")
    expect(page.locator(".call pre")).to_have_text('{ "city": "Paris" }')


@browsers
def test_reasoning_that_is_only_marked_is_folded_too(opened, served):
    page = opened()
    served.engine.script = "<think>\nHm.\n</think>\n\nFour."
    ask(page, "2 + 2?")
    expect(answers(page)).to_have_text("Four.")
    assert page.locator(".thought").text_content() == "Hm."


@browsers
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


@browsers
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
    served.engine.default_params = {}


class NoTemplate(FakeTokenizer):
    def chat(self, *_, **__):
        raise RequestError("this model has no chat template", "messages")


@browsers
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


@browsers
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


@browsers
def test_the_servers_figures_are_asked_for_only_while_they_are_seen(opened, served):
    scrapes = []
    page = opened("/page/icon.svg")
    page.clock.install()
    page.on("requestfinished", lambda asked: asked.url.endswith("/metrics") and scrapes.append(asked.url))
    page.goto(served.url)
    figure = lambda name: page.locator("#figures > div").filter(has_text=name).locator("dd")  # noqa: E731
    expect(figure("Running")).to_have_text("0")
    served.engine.script, served.engine.step_s = "x" * 2000, 0.02
    send(page, "Go on")
    expect(page.locator(".assistant .text")).to_contain_text("x")
    page.clock.run_for(2100)
    expect(figure("Running")).to_have_text("1")
    expect(figure("KV cache in use")).to_have_text("0.4%")
    assert page.locator("#figures .line").first.get_attribute("d")
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Server", exact=True).click()
    page.wait_for_load_state("networkidle")
    count = len(scrapes)
    page.clock.run_for(10_000)
    page.evaluate("() => fetch('/health')")
    assert count >= 2 and len(scrapes) == count
    page.reload()
    expect(page.locator("#live")).not_to_have_attribute("open", "")


LONG = (
    "averyverylongword" * 20
    + "\n\n```\n"
    + "code " * 60
    + "\n```\n\n|"
    + "a long cell|" * 12
    + "\n|"
    + "-|" * 12
    + "\n\n"
    + "https://a.example/"
    + "x" * 300
)


@browsers
@pytest.mark.parametrize("width", [320, 800])
def test_nothing_is_wider_than_a_phone(opened, served, width):
    page = opened(viewport={"width": width, "height": 640}, has_touch=True)
    served.engine.script = LONG
    page.get_by_label("Message", exact=True).fill("averyverylongword" * 20)
    page.get_by_role("button", name="Send", exact=True).click()
    expect(answers(page)).to_contain_text("code code")

    def wide():
        return page.evaluate(
            "() => [...document.querySelectorAll('html, body, #main, #scroll, #side, dialog[open]')].filter(e => e.scrollWidth > e.clientWidth).map(e => e.id || e.tagName)"
        )

    assert wide() == []
    page.get_by_role("button", name="Settings").click()
    assert wide() == []
    page.keyboard.press("Escape")
    expect(page.locator("#side")).to_be_hidden()
    page.get_by_role("button", name="Chats").click()
    expect(page.get_by_role("button", name="Close the list")).to_be_focused()
    assert wide() == []
    page.keyboard.press("Escape")
    expect(page.locator("#side")).to_be_hidden()
    expect(page.get_by_role("button", name="Chats")).to_be_focused()


# The contrast of every visible text with what is behind it, by WCAG's formula; those below what AA asks of their size.
CONTRAST = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
    const rgba = (color) => {
        canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = (color) => {
        const [r, g, b] = rgba(color).map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (e) => {
        for (; e; e = e.parentElement) {
            const color = getComputedStyle(e).backgroundColor;
            if (rgba(color)[3] === 255) return color;
        }
        return "white";
    };
    const poor = [];
    let seen = 0;
    for (const e of document.querySelectorAll("body *")) {
        const text = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || e.placeholder;
        if (!text || !e.checkVisibility({checkVisibilityCSS: true}) || e.closest(".hidden, option, noscript, :disabled")) continue;
        const style = getComputedStyle(e), pair = [light(style.color), light(behind(e))].sort((a, b) => b - a);
        seen += 1;
        if ((pair[0] + 0.05) / (pair[1] + 0.05) < 4.5) poor.push([e.tagName, e.textContent.slice(0, 30), style.color, behind(e)]);
    }
    return [seen, poor];
}"""


@browsers
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_themes_and_the_choice_is_kept(opened, served, scheme):
    page = opened(color_scheme=scheme)
    served.engine.script = "Text, `code`, [link](https://a.example).\n\n> quote\n\n```py\nx\n```\n\n| a |\n|---|\n| b |"
    ask(page)
    served.engine.queue_full = True
    send(page, "Fails")
    expect(page.locator(".error:visible")).to_be_visible()
    page.get_by_role("button", name="Delete").last.click()
    page.get_by_role("button", name="Undo").click()
    seen, poor = page.evaluate(CONTRAST)
    assert seen > 30 and not poor
    page.get_by_role("button", name="Settings").click()
    assert page.evaluate(CONTRAST)[1] == []
    page.keyboard.press("Escape")
    brightness = "() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
    dark = page.evaluate(brightness) < 200
    assert dark is (scheme == "dark")
    page.get_by_label("Theme").select_option("light" if dark else "dark")
    assert (page.evaluate(brightness) < 200) is not dark
    page.reload()
    assert (page.evaluate(brightness) < 200) is not dark


@browsers
def test_it_works_by_keyboard_and_everything_has_a_name(opened, served):
    page = opened()
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_count(1)
    assert "user\none\ntwo<|im_end|>" in served.engine.asked()
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.evaluate("() => { document.activeElement.blur(); document.body.focus(); }")
    page.keyboard.press("Control+Home")
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "() => (document.activeElement.ariaLabel || document.activeElement.labels?.[0]?.textContent || document.activeElement.textContent).trim()"
            )
        )
    assert {
        "New chat",
        "one two",
        "Rename",
        "Export",
        "Import",
        "Theme",
        "Settings",
        "Copy",
        "Edit",
        "Regenerate",
        "Message",
        "Send",
    } <= set(reached)
    outlined = page.evaluate(
        "() => { document.querySelector('#new').focus({focusVisible: true}); return getComputedStyle(document.activeElement).outlineStyle; }"
    )
    assert outlined == "solid"
    nameless = page.evaluate(
        "() => [...document.querySelectorAll('button, input, textarea, select, a, summary')]"
        ".filter(e => !(e.ariaLabel || e.labels?.[0]?.textContent || e.textContent).trim()).map(e => e.outerHTML)"
    )
    assert nameless == []
    levels = page.evaluate("() => [...document.querySelectorAll('h1, h2')].filter(e => e.checkVisibility()).map(e => e.tagName)")
    assert levels == ["H1", "H2", "H2"]


@browsers
def test_a_full_storage_is_said_and_loses_nothing_on_the_page(opened, served):
    page = opened()
    page.evaluate("() => localStorage.setItem('jaxllm.conversation.0000000000000000', 'x'.repeat(4_000_000))")
    ask(page)
    expect(page.locator("#banner")).to_contain_text("storage is full")
    expect(answers(page)).to_have_count(1)
