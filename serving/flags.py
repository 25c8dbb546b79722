"""How flags are read: from the command line, else from the --config file, else from the environment, else a dataclass's default.

A flag is a field of a dataclass with a sentence and a way to read its value. Imports neither JAX nor FastAPI.
"""

import argparse
import difflib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

PREFIX = "JAXLLM_"  # of environment variables: JAXLLM_MAX_MODEL_LEN is --max-model-len
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def human_length(text: str) -> int:
    """Tokens: 8192, 8k (thousands), 8K (1024s), 25.6k; "auto" is -1."""
    if text == "auto":
        return -1
    number, unit = (text[:-1], _UNITS[text[-1]]) if text[-1:] in _UNITS else (text, 1)
    try:
        value = float(number) * unit
    except ValueError:
        value = math.nan  # refused below, like inf and 0.3
    if not value.is_integer() or (value < 1 and value != -1):
        raise argparse.ArgumentTypeError(f"a number of tokens such as 8192, 8k (8000) or 8K (8192), or auto, is wanted, but it is {text!r}")
    return int(value)


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"a JSON object is wanted, but {text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"a JSON object is wanted, but it is {text!r}")
    return value


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """Reads an int from `low` to `high`."""

    def read(text: str) -> int:
        wanted = f"a whole number from {low}" + ("" if high is None else f" to {high}")
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{wanted} is wanted, but it is {text!r}") from None
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{wanted} is wanted, but it is {text}")
        return value

    return read


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"a fraction above 0 and up to 1 is wanted, but it is {text!r}")
    return value


def number(text: str) -> float:
    """Reads any finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"a number is wanted, but it is {text!r}")
    return value


def human_bytes(text: str) -> int:
    """Bytes: 1000, 500k (thousands), 32M (1024 * 1024s)."""
    try:
        return whole(1)(str(human_length(text)))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"a number of bytes such as 1000, 500k or 32M is wanted, but it is {text!r}") from None


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"a number of seconds above 0 is wanted, but it is {text!r}")
    return value


@dataclass(frozen=True)
class Flag:
    """`name` is the dataclass's field. kind: how to read the value, the values allowed, "list" for a flag that may be repeated, or
    "switch" for --name and --no-name."""

    name: str
    help: str
    kind: Callable[[str], Any] | Sequence[str] | str = str
    metavar: str | None = None
    unset: str = "none"  # how --help calls a default of None
    short: str | None = None


def add_flags(parser: argparse.ArgumentParser, groups: dict[str, list[Flag]], owner: type) -> None:
    """Every flag of `groups`; the namespace gets `owner`'s field names."""
    defaults = {field.name: _default(field) for field in fields(owner)}
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            _add_flag(group, flag, defaults[flag.name])


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _add_flag(group: argparse._ArgumentGroup, flag: Flag, default: Any) -> None:
    spelling = "--" + flag.name.replace("_", "-")
    names = [spelling] if flag.short is None else [spelling, flag.short]
    if flag.kind == "switch":
        shown = "on" if default else "off"
        action: Any = argparse.BooleanOptionalAction
        group.add_argument(*names, dest=flag.name, action=action, default=default, help=f"{flag.help} Default: {shown}.")
        return
    if flag.kind == "list":
        shown = ", ".join(default) or flag.unset
        text = f"{flag.help} May be repeated. Default: {shown}."
        group.add_argument(*names, dest=flag.name, action=_Gather, default=default, metavar=flag.metavar, help=text)
        return
    shown = flag.unset if default in (None, {}) else default
    kind: dict[str, Any] = {"type": flag.kind} if callable(flag.kind) else {"choices": flag.kind}
    # % is argparse's own sign in a help text.
    text = f"{flag.help} Default: {shown}.".replace("%", "%%")
    group.add_argument(*names, dest=flag.name, default=default, metavar=flag.metavar, help=text, **kind)


def values(args: argparse.Namespace, owner: type) -> dict[str, Any]:
    """What `args` says about `owner`'s fields."""
    return {field.name: getattr(args, field.name) for field in fields(owner)}


class _Gather(argparse.Action):
    """Gathers the values of a flag that may be repeated; one may also be a JSON list of them, as vLLM takes it."""

    def __call__(self, parser, namespace, value, option_string=None) -> None:
        before = getattr(namespace, self.dest)
        kept = () if before is self.default else before
        setattr(namespace, self.dest, (*kept, *_listed(value)))


def _listed(text: str) -> list[str]:
    try:
        found = json.loads(text) if text.startswith("[") else [text]
    except ValueError:
        found = [text]
    return found if all(isinstance(item, str) for item in found) else [text]


class Parser(argparse.ArgumentParser):
    """Takes --some_flag for --some-flag, as vLLM does; meets an unknown flag with the nearest known one.

    What the command line leaves out may come from the file that --config names, or from the environment.
    """

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        argv = [_dashes(arg) for arg in argv]
        given = self._named(argv)
        if (path := self._config_path(argv)) is not None:
            argv = [*self._from_file(path, given), *argv]
            given = self._named(argv)
        args, unknown = self.parse_known_args([*self._from_environment(os.environ, given), *argv])
        if unknown:
            self._refuse(next((arg for arg in unknown if arg.startswith("-")), unknown[0]))
        return args

    def _named(self, argv: Sequence[str]) -> set[str]:
        """The fields whose flags are in `argv`; a MODEL there is a model."""
        known = self._option_string_actions
        named = {known[name].dest for arg in argv if (name := arg.partition("=")[0]) in known}
        return named | ({"model"} if argv and not argv[0].startswith("-") else set())

    def _config_path(self, argv: Sequence[str]) -> str | None:
        just_this = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        just_this.add_argument("--config", default=os.environ.get(PREFIX + "CONFIG"))
        return just_this.parse_known_args(argv)[0].config if "--config" in self._option_string_actions else None

    def _from_file(self, path: str, given: set[str]) -> list[str]:
        import yaml  # late: most runs have no file

        try:
            found = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self.error(f"--config {path} cannot be read: {' '.join(str(error).split())}")
        if not isinstance(found, dict):
            self.error(f"--config {path} must hold options by name, such as max-model-len: 8k, but it holds {type(found).__name__}")
        argv = []
        for name, value in found.items():
            spelling = "--" + str(name).replace("_", "-")
            if (action := self._option_string_actions.get(spelling)) is None:
                self._refuse(spelling)
            if action.dest not in given:
                argv += _spelled(action, value)
        return argv

    def _from_environment(self, environment: Mapping[str, str], given: set[str]) -> list[str]:
        argv = []
        for action in self._actions:
            text = environment.get(PREFIX + action.dest.upper())
            if text is None or action.dest in given or not action.option_strings or action.help is argparse.SUPPRESS:
                continue
            value: Any = text
            if isinstance(action, argparse.BooleanOptionalAction):
                if text.lower() not in _TRUE + _FALSE:
                    self.error(f"{PREFIX}{action.dest.upper()} must be one of {', '.join(_TRUE + _FALSE)}, but it is {text!r}")
                value = text.lower() in _TRUE
            argv += _spelled(action, value)
        return argv

    def _refuse(self, arg: str) -> NoReturn:
        if not arg.startswith("-"):
            self.error(f"there is no place for the argument {arg!r}")
        name = arg.partition("=")[0]
        near = difflib.get_close_matches(name, self._option_string_actions, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; {self.prog} --help lists what there is"
        self.error(f"there is no option {name}{hint}")


def _spelled(action: argparse.Action, value: Any) -> list[str]:
    """A value of the file or the environment as the command line would say it. None says nothing."""
    name = action.option_strings[0]
    if value is None:
        return []
    if isinstance(action, argparse.BooleanOptionalAction) and isinstance(value, bool):
        return [name if value else action.option_strings[-1]]
    if isinstance(value, list):
        return [f"{name}={item}" for item in value]
    return [f"{name}={json.dumps(value) if isinstance(value, dict) else value}"]


def _dashes(arg: str) -> str:
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value
