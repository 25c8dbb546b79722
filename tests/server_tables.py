"""The tables of docs/server.md, made from the code. `python tests/server_tables.py` writes them; a test compares."""

import re
from dataclasses import fields
from pathlib import Path

from fake_engine import FakeEngine
from fastapi.routing import APIRoute

from jaxllm.config import EngineConfig
from serving import exposition, options
from serving.app import build_app
from serving.errors import TYPES
from serving.options import ServerOptions
from serving.parsers.calls import HARMONY, Form
from serving.parsers.enforce import NoGrammar, answer_grammar
from serving.parsers.table import REASONING_PARSERS, TOOL_PARSERS
from serving.protocol import Body, DrawingBody, PromptBody, SamplingBody
from serving.routes import chat, completions, embeddings, messages, responses, tokens
from serving.tools import Tool, Tools

PAGE = Path(__file__).parent.parent / "docs" / "server.md"
BODIES: list[type[Body]] = [PromptBody, DrawingBody, SamplingBody, completions.CompletionBody, chat.ChatBody, responses.ResponseBody]
BODIES += [messages.MessagesBody, embeddings.EmbeddingBody, embeddings.ScoreBody, embeddings.RerankBody]
BODIES += [tokens.TokenizeBody, tokens.DetokenizeBody]
WHEN = {
    400: "the request cannot be served as asked",
    401: "the key is missing or wrong",
    404: "no such route, model or stored response",
    405: "the route does not take this method",
    408: "the request did not arrive in time",
    409: "the profiler runs already, or does not run",
    413: "the body is too large",
    429: "the queue is full",
    431: "the headers are too large",
    500: "a mistake of the server's; its log says which",
    503: "the engine or the server is stopping",
}


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def routes() -> str:
    app = build_app(FakeEngine(), ServerOptions(enable_admin_routes=True))
    found: dict[str, set[str]] = {}
    for path, operations in app.openapi()["paths"].items():
        found[path] = {method.upper() for method in operations}
    hidden = [r for r in app.routes if isinstance(r, APIRoute) and not r.include_in_schema]
    for route in hidden:
        found[route.path] = set(route.methods or ())
    return table(("route", "methods"), [(f"`{path.replace(':path', '')}`", ", ".join(sorted(found[path]))) for path in sorted(found)])


def body_fields(kind: type[Body]) -> str:
    parent = kind.__mro__[1]
    own = {name: field for name, field in kind.model_fields.items() if name not in getattr(parent, "model_fields", {})}
    text = table(("field", "what it says"), [(f"`{name}`", field.description or "") for name, field in own.items()])
    inherited = getattr(parent, "refused", {})
    refused = sorted(name for name in kind.refused if name not in inherited)
    return text + ("\n\nKnown and refused: " + ", ".join(f"`{name}`" for name in refused) + "." if refused else "")


def flags() -> str:
    parts = []
    for groups, owner in ((options.SERVER, ServerOptions), (options.ENGINE, EngineConfig)):
        defaults = {field.name: getattr(owner(), field.name) for field in fields(owner)}
        for title, group in groups.items():
            rows = []
            for flag in group:
                default = defaults[flag.name]
                shown = {True: "on", False: "off"}[default] if flag.kind == "switch" else default
                said = flag.unset if shown in (None, (), {}) else ", ".join(shown) if isinstance(shown, tuple) else str(shown)
                rows.append((f"`--{flag.name.replace('_', '-')}`", flag.help, said))
            parts.append(f"\n**{title}**\n\n" + table(("flag", "what it does", "default"), rows))
    return "\n".join(parts).strip()


def metrics() -> str:
    rows = [(f"`jaxllm:{name}`", "gauge", what) for name, (what, _) in exposition.GAUGES.items()]
    rows += [(f"`jaxllm:{name}_total`", "counter", what) for name, (what, _) in exposition.COUNTERS.items()]
    rows.append(("`jaxllm:request_success_total`", "counter", f"Requests that ended, by finished_reason: {', '.join(exposition.ENDINGS)}."))
    rows += [(f"`jaxllm:{name}`", "histogram", what) for name, what in exposition.HISTOGRAMS.items()]
    return table(("metric", "kind", "what it says"), rows)


def tool_parsers() -> str:
    rows = []
    for name, form in TOOL_PARSERS.items():
        begins = [*form.dropped[:1], *form.marks] if form is not HARMONY else ["<|channel|>commentary to=functions.NAME"]
        shown = ", ".join(f"`{text}`" for text in [*begins, *form.openings[:1]])
        rows.append((f"`{name}`", form.models, shown, "in this form" if form.written else "as `json`", _strict(form)))
    return table(("--tool-call-parser", "models", "a call begins with", "calls that must be made", "`strict` with auto"), rows)


def _strict(form: Form) -> str:
    tools = Tools((Tool("f", None, {"type": "object"}, True),), "auto")
    try:
        answer_grammar(form, tools, None, "after", None, lambda text: None)
    except NoGrammar:
        return "refused"
    return "kept to"


def reasoning_parsers() -> str:
    rows = []
    for name, tags in REASONING_PARSERS.items():
        between = "`<|channel|>analysis<|message|>`, `<|end|>`" if isinstance(tags, Form) else f"`{tags.start}`, `{tags.end}`"
        rows.append((f"`{name}`", tags.models, between))
    return table(("--reasoning-parser", "models", "thoughts are between"), rows)


def filled(page: str) -> str:
    """`page` with every table as the code has it now."""
    made = {"routes": routes(), "flags": flags(), "metrics": metrics()}
    made["errors"] = table(("status", "type", "when"), [(str(status), f"`{name}`", WHEN[status]) for status, name in TYPES.items()])
    made |= {"tool parsers": tool_parsers(), "reasoning parsers": reasoning_parsers()}
    made |= {f"fields {kind.__name__}": body_fields(kind) for kind in BODIES}
    marks = set(re.findall(r"<!-- (.+): begin -->", page))
    assert marks == set(made), f"marks without a table, or tables without a mark: {sorted(marks ^ set(made))}"
    for name, text in made.items():
        pattern = rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)"
        page = re.sub(pattern, lambda match, text=text: f"{match[1]}{text}\n{match[2]}", page, flags=re.S)
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
