"""What the chat page looks like in a browser: text as Markdown and never as markup, narrow screens, contrast, keyboard, live figures."""

import re

import pytest
from page_fixtures import Scripted, answer_with, answers, ask, browsers, chromium, expect, send, watched
from server_fixtures import serving

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
    "a **b** *c* __d__ _e_": "<p>a <strong>b</strong> <em>c</em> <strong>d</strong> <em>e</em></p>",
    "***f*** ~~g~~": "<p><strong><em>f</em></strong> <del>g</del></p>",
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


def test_markdown_means_what_it_should_all_at_once_or_letter_by_letter(opened):
    page = opened()
    for text, meant in MARKDOWN.items():
        assert page.evaluate(RENDER, [[text, 1], [text, len(text)]]) == [meant, meant]
    whole = "\n\n".join(MARKDOWN)
    once, grown = page.evaluate(RENDER, [[whole, 1], [whole, 200]])
    assert once == grown


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


def test_reasoning_that_is_only_marked_is_folded_too(opened, served):
    page = opened()
    served.engine.script = "<think>\nHm.\n</think>\n\nFour."
    ask(page, "2 + 2?")
    expect(answers(page)).to_have_text("Four.")
    assert page.locator(".thought").text_content() == "Hm."


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
    expect(figure("KV cache")).to_have_text("0.4%")
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


@pytest.mark.parametrize("width", [320, 800])
def test_nothing_is_wider_than_a_phone(opened, served, width):
    page = opened(viewport={"width": width, "height": 640}, has_touch=True)
    served.engine.script = LONG
    page.get_by_label("Message", exact=True).fill("averyverylongword" * 20)
    page.get_by_role("button", name="Send", exact=True).click()
    expect(answers(page)).to_contain_text("code code")

    def wide():
        return page.evaluate("""() => [...document.querySelectorAll("html, body, #main, #scroll, #side, dialog[open]")]
            .filter((e) => e.scrollWidth > e.clientWidth).map((e) => e.id || e.tagName)""")

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
    name = """(e = document.activeElement) => (e.ariaLabel || e.labels?.[0]?.textContent || e.textContent).trim()"""
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(f"() => ({name})()"))
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
    page.locator("#new").focus()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("() => getComputedStyle(document.querySelector('#new')).outlineStyle") == "solid"
    everything = "[...document.querySelectorAll('button, input, textarea, select, a, summary')]"
    assert page.evaluate(f"() => {everything}.filter((e) => !({name})(e)).map((e) => e.outerHTML)") == []
    levels = page.evaluate("() => [...document.querySelectorAll('h1, h2')].filter(e => e.checkVisibility()).map(e => e.tagName)")
    assert levels == ["H1", "H2", "H2"]
