"""`jaxllm chat` and `jaxllm complete`: flags, one question or a dialogue, and how an answer looks on the terminal.

They talk to any OpenAI server and know nothing of engines: nothing here, or in what it imports, loads JAX.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from typing import Any, TextIO

from serving.client import Client, Piece, ServerError
from serving.flags import Flag, Parser, add_flags, number, values, whole

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
# A model's text must not steer the terminal: control characters other than line end and tab are left out.
_HARMLESS = {code: None for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


@dataclass(frozen=True)
class Sampling:
    """What a request says of drawing; None leaves it to the server."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class TerminalOptions:
    url: str = "http://127.0.0.1:8000/v1"
    model_name: str | None = None
    api_key: str | None = None
    system_prompt: str | None = None
    quick: str | None = None
    stats: bool = False


CLIENT = [
    Flag("url", "Where the server's routes begin.", metavar="URL"),
    Flag("model_name", "Model to ask for.", metavar="NAME", unset="the first that the server offers"),
    Flag("api_key", "Key to send.", metavar="KEY", unset="OPENAI_API_KEY, if that is set"),
    Flag("system_prompt", "What the conversation begins with.", metavar="TEXT"),
    Flag("quick", "Ask this one thing, print the answer, and end.", metavar="MESSAGE", unset="a dialogue", short="-q"),
    Flag("stats", "After an answer, print time to first token and tokens a second.", "switch"),
]
SAMPLING = [
    Flag("temperature", "0 takes the likeliest token.", number, "NUMBER"),
    Flag("top_p", "Draw from the likeliest tokens that have this probability together.", number, "NUMBER"),
    Flag("top_k", "Draw from so many likeliest tokens.", whole(-1), "COUNT"),
    Flag("min_p", "Draw from tokens at least so likely, compared with the likeliest.", number, "NUMBER"),
    Flag("presence_penalty", "Lowers every token that was produced already, once.", number, "NUMBER"),
    Flag("frequency_penalty", "Lowers every token by how often it was produced.", number, "NUMBER"),
    Flag("repetition_penalty", "Divides the logits of tokens that were there already.", number, "NUMBER"),
    Flag("seed", "Makes answers repeatable.", whole(0), "SEED"),
    Flag("max_tokens", "Tokens to generate at most.", whole(1), "COUNT"),
    Flag("min_tokens", "No end before so many tokens.", whole(0), "COUNT"),
    Flag("stop", "Text that ends the answer.", "list", "TEXT"),
]


def parser(command: str) -> Parser:
    """`jaxllm chat` or `jaxllm complete`."""
    what = {
        "chat": "Talk with a model that any OpenAI server serves.",
        "complete": "Let a model that any OpenAI server serves continue texts.",
    }
    made = Parser(prog=f"jaxllm {command}", description=f"{what[command]} What is piped in is asked as one text.")
    add_flags(made, {"Options": [flag for flag in CLIENT if command == "chat" or flag.name != "system_prompt"]}, TerminalOptions)
    add_flags(made, {"Drawing (the server's defaults unless given)": SAMPLING}, Sampling)
    return made


def main(command: str, argv: Sequence[str]) -> int:
    """Runs `command`. Returns 0; 1 with a sentence if the server fails; 130 if Ctrl-C ended the one answer that was asked for."""
    args = parser(command).parse(argv)
    try:
        return _run(command, args)
    except ServerError as error:
        print(f"jaxllm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has gone; let the interpreter's last flush meet nobody
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(command: str, args: argparse.Namespace) -> int:
    from serving.dialogue import Dialogue

    client = Client(args.url, args.api_key or os.environ.get("OPENAI_API_KEY"))
    talk = Talk(client, args.model_name or client.model(), command == "chat", values(args, Sampling), Screen(sys.stdout, args.stats))
    system = getattr(args, "system_prompt", None)
    if args.quick is None and sys.stdin.isatty():
        Dialogue(talk, system).run()
        return 0
    text = sys.stdin.read() if args.quick is None else args.quick
    if not text.strip():
        raise ServerError("There is nothing to ask: the text is empty")
    talk.ask([*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": text}])
    return 0


class Screen:
    """Where answers appear: reasoning dim, text plain, and after it what it took."""

    def __init__(self, out: TextIO, stats: bool):
        self._out, self._stats = out, stats
        self._styled = out.isatty() and "NO_COLOR" not in os.environ

    @property
    def wants_usage(self) -> bool:
        return self._stats

    def show(self, pieces: Iterator[Piece]) -> Iterator[str]:
        """Writes the pieces as they come, and yields the text of each."""
        start, first, tokens, dim = time.perf_counter(), None, None, False
        try:
            for piece in pieces:
                if first is None and (piece.text or piece.reasoning):
                    first = time.perf_counter()
                tokens = piece.tokens or tokens
                if piece.reasoning:
                    self._write(piece.reasoning, "" if dim or not self._styled else DIM)
                    dim = True
                if piece.text:
                    self._write(piece.text, self._end_of_reasoning() if dim else "")
                    dim = False
                    yield piece.text
        finally:
            if first is not None:
                print(PLAIN if dim and self._styled else "", file=self._out, flush=True)
        if self._stats and first is not None:
            print(stats(first - start, time.perf_counter() - first, tokens), file=sys.stderr)

    def _end_of_reasoning(self) -> str:
        return f"{PLAIN if self._styled else ''}\n\n"

    def _write(self, text: str, before: str) -> None:
        if self._out.isatty():
            text = text.translate(_HARMLESS)
        print(before + text, end="", file=self._out, flush=True)


def stats(ttft: float, rest: float, tokens: int | None) -> str:
    """A line about one answer. rest: seconds from the first token to the end."""
    if tokens is None:
        return f"TTFT: {ttft * 1000:.1f} ms (the server did not count the tokens)"
    rate = f"{(tokens - 1) / rest:.1f} tok/s" if tokens > 1 and rest > 0 else "- tok/s"
    return f"TTFT: {ttft * 1000:.1f} ms, {rate}, {tokens} tokens in {ttft + rest:.2f} s"


class Talk:
    """Asks for answers and shows them. settings: Sampling's fields; the dialogue changes them."""

    def __init__(self, client: Client, model: str, is_chat: bool, settings: dict[str, Any], screen: Screen):
        self.model, self.is_chat, self.settings = model, is_chat, settings
        self._client, self._screen = client, screen

    def ask(self, messages: list[dict[str, str]], kept: list[str] | None = None) -> str:
        """The answer's text, written out as it came. kept: gets each piece, so that what came before an interruption is not lost.

        Without a chat, the last message's text is continued.
        """
        kept = [] if kept is None else kept
        body: dict[str, Any] = {"model": self.model} | {name: value for name, value in self.settings.items() if value not in (None, ())}
        if self._screen.wants_usage:
            body["stream_options"] = {"include_usage": True}
        if self.is_chat:
            pieces = self._client.stream("/chat/completions", body | {"messages": messages})
        else:
            pieces = self._client.stream("/completions", body | {"prompt": messages[-1]["content"]})
        with closing(pieces):  # pyright: ignore[reportArgumentType]
            for text in self._screen.show(pieces):
                kept.append(text)
        return "".join(kept)


SETTINGS = {flag.name: flag for flag in SAMPLING}
assert SETTINGS.keys() == {field.name for field in fields(Sampling)}
