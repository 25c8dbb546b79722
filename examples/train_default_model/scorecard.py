"""Scores a model on what it never saw, through the engine that serves it, and writes the numbers and every answer down.

    python scorecard.py DATA PREPARED OUT.md [--model FOLDER] [--dialogues 300]

Nothing is chosen afterwards: the prompts are in prompts.json, the held-out documents are those that data.py holds out (the test split
of the tool dialogues, one arithmetic question in ten), and sampling takes the model's own defaults and a fixed seed.
"""

import argparse
import asyncio
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import chores
import numpy as np
from data import read
from prepare import CHAT, TOKEN

from jaxllm import LLM, SamplingParams
from serving.parsers.table import choose
from serving.reading import reading
from serving.tools import Tools, chat_tools

HERE = Path(__file__).parent
GREEDY = SamplingParams(temperature=0.0, max_tokens=256)
CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
TYPES: dict[str, Any] = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}


def loss_of(llm: LLM, prepared: Path, documents: int) -> dict[str, tuple[float, int]]:
    """Nats a learned token, and how many tokens: the first held-out rows of each source, each token given the ones before it."""
    found = {}
    for path in sorted((prepared / "held_out").glob("*.npy")):
        rows = np.load(path)[:documents, :2048]
        if not len(rows):
            continue
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        answers = llm.generate([(row & TOKEN).tolist() for row in rows[:, :2047]], params, use_tqdm=False)
        nats, count = 0.0, 0
        for row, answer in zip(rows, answers, strict=True):
            assert answer.prompt_logprobs is not None
            for i in np.flatnonzero(row[1:2047] >= CHAT) + 1:
                at = answer.prompt_logprobs[int(i)]
                assert at is not None
                nats -= at[0].logprob
                count += 1
        found[path.stem] = (nats / max(count, 1), count)
    return found


def fits(value: Any, schema: dict) -> bool:
    """Whether an argument has its parameter's type, and is one of its values where these are listed."""
    kind = TYPES.get(schema.get("type", ""), object)
    right = isinstance(value, kind) and not (isinstance(value, bool) and schema.get("type") in ("integer", "number"))
    return right and value in schema.get("enum", [value])


def _fits_all(arguments: dict, schema: dict) -> bool:
    known = schema["properties"]
    return set(schema.get("required", [])) <= set(arguments) <= set(known) and all(fits(v, known[k]) for k, v in arguments.items())


def _object(text: str) -> dict:
    """The JSON object that `text` is, or an empty one."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def judge_call(text: str, tools: list[dict], expected: dict) -> dict[str, bool]:
    """How far a due call comes: from being one at all to being the one that was due."""
    found = CALL.search(text)
    made = _object(found[1]) if found else {}
    name, arguments = made.get("name"), made.get("arguments")
    parsed = isinstance(arguments, dict) and isinstance(name, str)
    given = {t["function"]["name"]: t["function"]["parameters"] for t in tools}
    named = parsed and name in given
    valid = isinstance(arguments, dict) and named and _fits_all(arguments, given[str(name)])
    right = named and name == expected["name"]
    return {
        "calls a tool": found is not None,
        "parses": parsed,
        "names a given tool": named,
        "fits its schema": valid,
        "names the right tool": right,
        "exact match": right and arguments == json.loads(expected["arguments"]),
    }


def due_calls(data: Path, count: int) -> list[tuple[list[dict], list[dict], dict]]:
    """`count` places of the test split where a call is due: what was said before, the tools, the call."""
    places = [
        (row["messages"][:i], row["tools"], message["tool_calls"][0]["function"])
        for row in read(data, "chat/sgd_tool_chat")
        if row["split"] == "test"
        for i, message in enumerate(row["messages"])
        if message.get("tool_calls")
    ]
    return Random(0).sample(places, count)


def ask_all(llm: LLM, chats: list[tuple[list[dict], list[dict] | None]], strict: bool = False) -> list[str]:
    """Greedy answers. strict: what `jaxllm serve` makes of the same tools with `"strict": true`, which calls are held to."""
    assert llm.tokenizer is not None
    prompts, params = [], []
    for messages, tools in chats:
        asked = chat_tools([_strict(function) for function in _by_name(tools or [])], "auto", None) if strict else None
        prompt = llm.tokenizer.chat(messages, tools=asked.template["tools"] if asked else tools)
        prompts.append(prompt[-(llm.engine.max_model_len - 256) :])  # the longest dialogues lose their beginning
        params.append(replace(GREEDY, **_held(llm.tokenizer, asked, prompts[-1])) if asked else GREEDY)
    return [o.outputs[0].text for o in llm.generate(prompts, params, use_tqdm=False)]


def _held(tokenizer: Any, tools: Tools, prompt: list[int]) -> dict[str, Any]:
    read = asyncio.run(reading(tokenizer, choose("auto", "auto", tokenizer.chat_templates), tools, prompt))
    assert read is not None
    return read.params


def _by_name(tools: list[dict]) -> list[dict]:
    """The functions; of two of a name, the one that a call is judged by."""
    return [*{tool["function"]["name"]: tool["function"] for tool in tools}.values()]


def _strict(function: dict) -> dict:
    """A strict tool: without parameters of other names, as OpenAI wants it, and in alphabetical order, in which the model learned them."""
    parameters = function["parameters"]
    parameters = parameters | {"properties": dict(sorted(parameters["properties"].items())), "additionalProperties": False}
    return {"type": "function", "function": function | {"strict": True, "parameters": parameters}}


def tool_calls(llm: LLM, data: Path, count: int) -> dict[str, list[float]]:
    """Shares of due calls: as the model makes them, and with strict tools."""
    places, found = due_calls(data, count), {}
    for strict in (False, True):
        answers = ask_all(llm, [(messages, tools) for messages, tools, _ in places], strict)
        judged = [judge_call(a, tools, due) for a, (_, tools, due) in zip(answers, places, strict=True)]
        for name in judged[0]:
            found.setdefault(name, []).append(sum(j[name] for j in judged) / count)
    return found


def exact_answers(llm: LLM, count: int) -> dict[str, float]:
    """Questions of chores.py from seeds that training never used; arithmetic with numbers that it never showed together."""
    makers = {
        "arithmetic, held-out numbers": lambda random: chores.arithmetic(random, held=True),
        "arithmetic, numbers up to 20": _small,
        "counting": chores.counting,
        "days and months": chores.days,
        "tiny worlds": chores.world,
    }
    found = {}
    for name, make in makers.items():
        asked = [make(Random(10**6 + i)) for i in range(count)]
        answers = ask_all(llm, [(m[:1], None) for m in asked])
        found[name] = sum(a.strip() == m[1]["content"] for a, m in zip(answers, asked, strict=True)) / count
    asked = [chores.as_json(Random(10**6 + i)) for i in range(count)]
    answers = ask_all(llm, [(m[:1], None) for m in asked])
    found["JSON: parses"] = sum(map(_is_json, answers)) / count
    determined = [(a, m) for a, m in zip(answers, asked, strict=True) if _determined(m)]
    found["JSON: exactly what was said"] = sum(a == m[1]["content"] for a, m in determined) / len(determined)
    return found


def _small(random: Random) -> list[dict]:
    while True:
        made = chores.arithmetic(random, held=True)
        if all(int(n) <= 20 for n in re.findall(r"\d+", made[0]["content"])) and not re.search(r"[*x]|times", made[0]["content"]):
            return made


def _determined(messages: list[dict]) -> bool:
    """Whether the question leaves no choice: every value of the answer is in it."""
    return all(str(v) in messages[0]["content"] for v in _values(json.loads(messages[1]["content"])) if v is not True)


def _values(value: Any) -> list:
    return list(value.values()) if isinstance(value, dict) else value


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def answers_to_prompts(llm: LLM) -> list[tuple[dict, str]]:
    assert llm.tokenizer is not None
    asked = json.loads((HERE / "prompts.json").read_text())
    prompts = [
        llm.tokenizer.encode(p["text"])
        if "text" in p
        else llm.tokenizer.chat([{"role": "user", "content": p["chat"]}], tools=p.get("tools"))
        for p in asked
    ]
    params = replace(llm.default_params(), max_tokens=400, seed=0)
    return list(zip(asked, (o.outputs[0].text for o in llm.generate(prompts, params, use_tqdm=False)), strict=True))


def report(args: argparse.Namespace, llm: LLM) -> str:
    lines = ["# Scorecard", "", f"Made by `python {' '.join(map(short, sys.argv))}`.", "", "## Held-out loss", ""]
    lines += ["| source | tokens | nats a token | perplexity |", "|---|---|---|---|"]
    for name, (nats, count) in loss_of(llm, args.prepared, args.documents).items():
        lines.append(f"| {name} | {count:,} | {nats:.3f} | {np.exp(nats):.2f} |")
    lines += ["", f"## Tool calls: {args.dialogues} places of the test split where one is due, greedy", ""]
    lines += ['| | share | of tools with `"strict": true` |', "|---|---|---|"]
    lines += [f"| {name} | {free:.1%} | {strict:.1%} |" for name, (free, strict) in tool_calls(llm, args.data, args.dialogues).items()]
    lines += ["", f"## Answers with one right form: {args.questions} of each, greedy", "", "| | share |", "|---|---|"]
    lines += [f"| {name} | {share:.1%} |" for name, share in exact_answers(llm, args.questions).items()]
    lines += ["", "## Twenty prompts", "", "With the sampling of generation_config.json and seed 0, all of them, as they came.", ""]
    for i, (asked, answer) in enumerate(answers_to_prompts(llm), 1):
        shown = asked.get("chat") or f"{asked['text']} (continued, without a chat)"
        with_tools = " (with the tool get_weather)" if "tools" in asked else ""
        quoted = "\n".join(f"> {line}" if line else ">" for line in answer.strip().splitlines())
        lines += [f"**{i}. {shown}**{with_tools}", "", quoted, ""]
    return "\n".join(lines).rstrip() + "\n"


def short(argument: str) -> str:
    """A path without the folders above: where somebody keeps things says nothing."""
    return Path(argument).name if "/" in argument else argument


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=None, help="a folder; the model that ships if left out")
    parser.add_argument("--documents", type=int, default=8, help="held-out rows of each source")
    parser.add_argument("--dialogues", type=int, default=300)
    parser.add_argument("--questions", type=int, default=200)
    args = parser.parse_args()
    with LLM(args.model, max_num_seqs=16) as llm:
        args.out.write_text(report(args, llm))


if __name__ == "__main__":
    main()
