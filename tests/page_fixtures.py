"""What tests of the chat page share: an engine that says what it is told, Debian's Chromium, and a watch over what the page does.

Chromium is the machine's own, driven by Playwright's Python package; nothing is downloaded. A browser test also fails if the page logs an
error, or asks anything of another origin.
"""

import contextlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_engine import FakeEngine
from server_fixtures import Served

from jaxllm.request import Completion

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browsers = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="needs playwright's Python package and a Chromium on the PATH (Debian: apt-get install chromium)",
)
PATIENCE_MS = 15_000  # long enough for a busy machine; a test that passes waits for no longer than it must


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
        return self._words.decode(list(self.served[which].prompt_token_ids), skip_special_tokens=False)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # As root, as in most containers, Chromium's own sandbox cannot be had.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def watched(browser: Any, served: Served) -> Iterator[Callable[..., Any]]:
    """A way to open the page, each time in a browser that has never seen it. At the end nothing may have gone wrong behind it."""
    contexts, wrong = [], []
    engine = served.engine
    engine.script, engine.step_s, engine.queue_full, engine.fail_at, engine.default_params = None, 0.0, False, None, {}
    engine.served.clear()
    engine.aborted.clear()

    def opened(path: str = "/", at: Served = served, **options: Any) -> Any:
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

    yield opened
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


def answer_with(page, *deltas: dict, done: bool = True) -> None:
    """Has the page's next chat answered by these deltas."""
    lines = [f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta, 'finish_reason': None}]})}\n\n" for delta in deltas]
    body = "".join(lines) + "data: [DONE]\n\n" * done
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, headers={"content-type": "text/event-stream"}), times=1)
