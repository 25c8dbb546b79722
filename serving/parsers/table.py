"""The parsers by the names that --tool-call-parser and --reasoning-parser know, vLLM's; which of them a model's chat template asks for.

Imports neither JAX nor FastAPI nor a tokenizer: the command line reads it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from jaxllm.request import ConfigError
from serving.parsers import calls
from serving.parsers.calls import HARMONY, Form

Place = Literal["before", "within", "after"]


@dataclass(frozen=True)
class Tags:
    """What is around a model's thinking.

    begins: where an answer is when neither it nor the prompt has the start tag; "within" for models that think without one. template:
    what is searched for in a chat template to know that the model is of this kind.
    """

    models: str
    start: str
    end: str
    begins: Place
    template: str

    @property
    def tokens(self) -> tuple[str, ...]:
        """What must stay in the text even if it is a special token."""
        return self.start, self.end

    def place(self, prompt_end: str) -> Place:
        """Where the answer to a prompt with this end begins."""
        end = prompt_end.rstrip()
        return "within" if end.endswith(self.start) else "after" if end.endswith(self.end) else self.begins


# In the order in which a template is searched: what is more particular comes first.
TOOL_PARSERS: dict[str, Form] = {
    "openai": HARMONY,
    "qwen3_coder": calls.XML,
    "hermes": calls.HERMES,
    "mistral": calls.MISTRAL_ARGS,
    "mistral_json": calls.MISTRAL,
    "deepseek_v3": calls.DEEPSEEK,
    "deepseek_v31": calls.DEEPSEEK_V31,
    "pythonic": calls.PYTHONIC,
    "llama3_json": calls.LLAMA_JSON,
    "json": calls.JSON,
}
REASONING_PARSERS: dict[str, Tags | Form] = {
    "openai_gptoss": HARMONY,
    "deepseek_r1": Tags("DeepSeek R1: its answers begin within a thought", "<think>", "</think>", "within", r"<｜Assistant｜>.*</think>"),
    "qwen3": Tags("Qwen 3, and others with these tags; the prompt may have the first", "<think>", "</think>", "before", r"</?think>"),
}


@dataclass(frozen=True)
class Parsers:
    """What a server reads its model's answers with, by name. None: no calls are read, nothing is told to be thinking."""

    tool: str | None = None
    reasoning: str | None = None

    @property
    def form(self) -> Form | None:
        return None if self.tool is None else TOOL_PARSERS[self.tool]

    @property
    def tags(self) -> Tags | Form | None:
        return None if self.reasoning is None else REASONING_PARSERS[self.reasoning]


def choose(tool: str, reasoning: str, templates: Mapping[str, str]) -> Parsers:
    """The parsers of these names; for "auto", those that the model's chat templates ask for. Raises ConfigError for two that differ."""
    made = Parsers(_choose(tool, TOOL_PARSERS, templates.values()), _choose(reasoning, REASONING_PARSERS, templates.values()))
    if (made.form is HARMONY) != (made.tags is HARMONY):
        raise ConfigError(
            f"gpt-oss' answers are read as a whole: --tool-call-parser openai goes with --reasoning-parser openai_gptoss, but here are "
            f"{made.tool or 'none'} and {made.reasoning or 'none'}"
        )
    return made


def _choose(name: str, table: Mapping[str, Form | Tags], templates: Iterable[str]) -> str | None:
    if name != "auto":
        return None if name == "none" else name
    for each, row in table.items():
        if row.template is not None and any(re.search(row.template, text, re.S) for text in templates):
            return each
    return None
