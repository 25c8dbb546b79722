"""The dialogue of `jaxllm chat` and `jaxllm complete` on a terminal: what is typed, the conversation so far, and commands to change it."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from serving.client import ServerError
from serving.terminal import SETTINGS, Talk

BLOCK = '"""'  # what a text of several lines stands between
KEPT_LINES = 1000  # of what was typed, from one dialogue to the next

# By what a user types: what --help of it says.
COMMANDS = {
    "/help": "list these",
    "/clear": "forget the conversation; the system prompt stays",
    "/system [TEXT]": "set the system prompt, or without TEXT drop it",
    "/set [NAME [VALUE]]": "change how tokens are drawn (temperature 0.5); without VALUE leave it to the server; alone, show what is set",
    "/regenerate": "ask for the last answer again",
    "/save FILE": "write conversation and settings to a file",
    "/load FILE": "read them back",
    "/exit": "end, as Ctrl-D does",
}
HELP = (
    "\n".join(f"  {name:<20} {what}" for name, what in COMMANDS.items())
    + f"""
  Ctrl-C stops an answer. A line that ends in \\ goes on in the next; a text between {BLOCK} and {BLOCK} may have many lines.
  A text that begins with / is written with //."""
)


class Complaint(Exception):
    """What a command could not do, as a sentence."""


class Dialogue:
    """Owns the conversation. Without a chat (`talk.is_chat`) there is none: each text is continued by itself."""

    def __init__(self, talk: Talk, system: str | None):
        self._talk = talk
        self._messages: list[dict[str, str]] = []
        self._set_system(system or "")

    def run(self) -> None:
        """Until Ctrl-D or /exit."""
        print(f"{self._talk.model}. /help lists commands, Ctrl-D ends.")
        with _history():
            for text in _typed():
                try:
                    if text == "/exit":
                        return
                    self._do(text)
                except (Complaint, ServerError) as error:
                    print(f"{error}", file=sys.stderr)

    def _do(self, text: str) -> None:
        if not text.startswith("/") or text.startswith("//"):
            return self._say(text.removeprefix("/") if text.startswith("//") else text)
        name, _, rest = text.partition(" ")
        commands: dict[str, Callable[[str], object]] = {
            "/help": lambda _: print(HELP),
            "/clear": self._clear,
            "/system": self._set_system,
            "/set": self._set,
            "/regenerate": self._regenerate,
            "/save": self._save,
            "/load": self._load,
        }
        if name not in commands:
            raise Complaint(f"There is no command {name}: /help lists what there is")
        commands[name](rest.strip())

    def _say(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})
        self._answer()

    def _answer(self) -> None:
        """Answers the last message. What Ctrl-C interrupts is kept as far as it came; what fails leaves no trace."""
        kept: list[str] = []
        try:
            self._talk.ask(self._messages, kept)
        except KeyboardInterrupt:
            print("\n(stopped)")
        finally:
            if kept:
                self._messages.append({"role": "assistant", "content": "".join(kept)})
            else:
                del self._messages[-1]

    def _clear(self, _: str = "") -> None:
        self._messages = [message for message in self._messages if message["role"] == "system"]

    def _set_system(self, text: str) -> None:
        rest = [message for message in self._messages if message["role"] != "system"]
        self._messages = [*([{"role": "system", "content": text}] if text else []), *rest]

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        name = name.replace("-", "_").lstrip("_")
        if not name:
            shown = [f"{key} {value}" for key, value in self._talk.settings.items() if value not in (None, ())]
            print("\n".join(shown) or f"nothing is set; there is {', '.join(SETTINGS)}")
            return
        if name not in SETTINGS:
            raise Complaint(f"There is no setting {name}: there is {', '.join(SETTINGS)}")
        self._talk.settings[name] = self._read(name, value.strip())

    def _read(self, name: str, text: str) -> Any:
        kind = SETTINGS[name].kind
        if not text:
            return None
        try:
            return kind(text) if callable(kind) else (text,)
        except argparse.ArgumentTypeError as error:
            raise Complaint(f"{name}: {error}") from None

    def _regenerate(self, _: str) -> None:
        if not self._messages or self._messages[-1]["role"] != "assistant":
            raise Complaint("There is no answer yet that could be given again")
        del self._messages[-1]
        self._answer()

    def _save(self, name: str) -> None:
        text = json.dumps({"model": self._talk.model, "settings": self._talk.settings, "messages": self._messages}, indent=1)
        try:
            _file(name).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise Complaint(f"{name} cannot be written: {error.strerror}") from None

    def _load(self, name: str) -> None:
        try:
            found = json.loads(_file(name).read_text(encoding="utf-8"))
            messages = [{"role": str(message["role"]), "content": str(message["content"])} for message in found["messages"]]
            settings = {key: value for key, value in found["settings"].items() if key in SETTINGS}
        except OSError as error:
            raise Complaint(f"{name} cannot be read: {error.strerror}") from None
        except (ValueError, LookupError, TypeError, AttributeError):
            raise Complaint(f"{name} is no conversation that /save has written") from None
        self._messages = messages
        self._talk.settings.update(settings)
        print(f"{len(messages)} messages")


def _file(name: str) -> Path:
    if not name:
        raise Complaint("A file must be named")
    return Path(name).expanduser()


def _typed() -> Iterator[str]:
    """Each text, complete and not empty. Ctrl-C drops what was typed; Ctrl-D ends."""
    while True:
        try:
            text = input("> ")
            while text.endswith("\\"):
                text = text[:-1] + "\n" + input(". ")
            while text.startswith(BLOCK) and not (len(text) >= 2 * len(BLOCK) and text.endswith(BLOCK)):
                text += "\n" + input(". ")
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends)")
            continue
        except EOFError:
            print()
            return
        text = text.removeprefix(BLOCK).removesuffix(BLOCK).strip("\n") if text.startswith(BLOCK) else text.strip()
        if text:
            yield text


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Line editing, and what was typed in earlier dialogues, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    path = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "jaxllm" / "history"
    readline.parse_and_bind("tab: complete")
    readline.set_completer_delims("")
    readline.set_completer(_complete)
    readline.set_history_length(KEPT_LINES)
    with contextlib.suppress(OSError):  # none yet, or a home that cannot be written: then this dialogue has only its own
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)


def _complete(text: str, state: int) -> str | None:
    names = [*(name.partition(" ")[0] for name in COMMANDS), *(f"/set {name}" for name in SETTINGS)]
    found = [name for name in names if name.startswith(text)] if text.startswith("/") else []
    return found[state] if state < len(found) else None
