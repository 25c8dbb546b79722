"""The flags of `jaxllm serve`: one table, in which a flag is a field of EngineConfig or ServerOptions with a sentence and a way to read it.

vLLM's names wherever the meaning is vLLM's. Defaults are not written here: they are the dataclasses'. Imports neither JAX nor FastAPI.
"""

import argparse
import difflib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, NoReturn

from jaxllm.config import ATTENTION_BACKENDS, DTYPES, KV_CACHE_DTYPES, LOAD_FORMATS, EngineConfig

_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class ServerOptions:
    """How the server listens and whom it answers."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    enable_log_requests: bool = False
    api_server_count: int = 1


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


@dataclass(frozen=True)
class Flag:
    """`name` is the dataclass's field. kind: how to read the value, the values allowed, or "switch" for --name and --no-name."""

    name: str
    help: str
    kind: Callable[[str], Any] | Sequence[str] | str = str
    metavar: str | None = None
    unset: str = "none"  # how --help calls a default of None
    short: str | None = None


SERVER = {
    "Server": [
        Flag("host", "Address to listen on; 0.0.0.0 answers other machines too.", metavar="ADDRESS"),
        Flag("port", "Port to listen on; 0 takes a free one.", whole(0, 65535), "PORT"),
        Flag("api_key", "Serve only clients that send this key as their bearer token.", metavar="KEY", unset="everybody is served"),
        Flag("api_server_count", "Processes that speak HTTP; one streams some 20,000 tokens a second.", whole(1, 64), "COUNT"),
        Flag("enable_log_requests", "Log a line for every request when it ends.", "switch"),
    ],
}
ENGINE = {
    "Model": [
        Flag("model", "Model folder or Hub id, the same as MODEL.", unset="the model in the package"),
        Flag("served_model_name", "Name by which clients call the model.", metavar="NAME", unset="MODEL as given"),
        Flag("tokenizer", "Folder or Hub id of another tokenizer.", unset="the model's own"),
        Flag("chat_template", "File with a Jinja chat template, or the template itself.", metavar="FILE", unset="the model's own"),
        Flag("generation_config", "Where sampling defaults come from: auto is the model, vllm is nowhere, or a folder.", metavar="SOURCE"),
        Flag("hf_overrides", "JSON object laid over the model's config.json.", json_object, "JSON"),
        Flag("dtype", "Type of weights and arithmetic; auto follows the checkpoint.", DTYPES),
        Flag(
            "max_model_len",
            "Most tokens of prompt and answer together: 8192, 8k, 8K, auto.",
            human_length,
            "TOKENS",
            "the model's limit",
        ),
        Flag("max_logprobs", "Most log-probabilities a request may ask for at each token.", whole(0), "COUNT"),
        Flag("seed", "Seed of requests that bring none, and of dummy weights.", whole(0), "SEED"),
        Flag("enforce_eager", "Start quickly with few compiled sizes, at the price of speed.", "switch"),
        Flag("trust_remote_code", "Refused: jaxllm never runs code from a checkpoint.", "switch"),
    ],
    "Loading": [
        Flag("load_format", "Which weight files to read; dummy makes random weights.", LOAD_FORMATS),
        Flag("revision", "Branch, tag or commit on the Hub.", unset="the main branch"),
        Flag("download_dir", "Folder for what is downloaded from the Hub.", metavar="FOLDER", unset="the Hub's cache"),
    ],
    "Devices and memory": [
        Flag("device", "Kind of device to run on; auto takes GPUs when there are any.", ("auto", "cpu", "cuda")),
        Flag("tensor_parallel_size", "Devices to split the model over.", whole(1), "COUNT", short="-tp"),
        Flag("gpu_memory_utilization", "Fraction of each GPU's memory to use in all.", fraction, "FRACTION"),
        Flag("block_size", "Tokens in a page of the KV cache.", whole(1), "TOKENS", "chosen for the device"),
        Flag("kv_cache_dtype", "Type of cached keys and values: fp8 holds twice as many tokens; auto is --dtype.", KV_CACHE_DTYPES),
        Flag("attention_backend", "Attention kernels to run; auto takes the fastest for the device.", ATTENTION_BACKENDS),
        Flag("num_gpu_blocks_override", "Pages in the KV cache, whatever memory allows.", whole(1), "COUNT", "from memory"),
        Flag("enable_prefix_caching", "Keep finished prompts' pages for prompts that begin alike.", "switch"),
    ],
    "Batching": [
        Flag("max_num_seqs", "Most sequences that run at once.", whole(1), "COUNT", "from memory and device"),
        Flag("max_num_batched_tokens", "Most tokens in one step.", whole(1), "TOKENS", "from memory and device"),
    ],
}


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
    shown = flag.unset if default in (None, {}) else default
    kind: dict[str, Any] = {"type": flag.kind} if callable(flag.kind) else {"choices": flag.kind}
    # % is argparse's own sign in a help text.
    text = f"{flag.help} Default: {shown}.".replace("%", "%%")
    group.add_argument(*names, dest=flag.name, default=default, metavar=flag.metavar, help=text, **kind)


def values(args: argparse.Namespace, owner: type) -> dict[str, Any]:
    """What `args` says about `owner`'s fields."""
    return {field.name: getattr(args, field.name) for field in fields(owner)}


class Parser(argparse.ArgumentParser):
    """Takes --some_flag for --some-flag, as vLLM does; meets an unknown flag with the nearest known one."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        args, unknown = self.parse_known_args([_dashes(arg) for arg in argv])
        if unknown:
            self._refuse(next((arg for arg in unknown if arg.startswith("-")), unknown[0]))
        return args

    def _refuse(self, arg: str) -> NoReturn:
        if not arg.startswith("-"):
            self.error(f"there is no place for the argument {arg!r}")
        name = arg.partition("=")[0]
        near = difflib.get_close_matches(name, self._option_string_actions, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; {self.prog} --help lists what there is"
        self.error(f"there is no option {name}{hint}")


def _dashes(arg: str) -> str:
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value


def server_parser() -> Parser:
    """`jaxllm serve`: positional MODEL or --model, then the flags of ServerOptions and EngineConfig."""
    parser = Parser(prog="jaxllm serve", usage="jaxllm serve [MODEL] [options]", description="Serve a model over OpenAI's HTTP API.")
    parser.add_argument("model_argument", nargs="?", metavar="MODEL", help="Model folder or Hub id. Default: the model in the package.")
    add_flags(parser, SERVER, ServerOptions)
    parser.add_argument("--disable-log-requests", dest="enable_log_requests", action="store_false", help=argparse.SUPPRESS)
    add_flags(parser, ENGINE, EngineConfig)
    return parser


def convert_parser() -> Parser:
    """`jaxllm convert`: MODEL, FOLDER, and the flags that say how MODEL is found and read."""
    parser = Parser(
        prog="jaxllm convert",
        description="Write a model in jaxllm's own form (Orbax), which starts sharded straight to the devices and keeps the tokenizer.",
    )
    parser.add_argument("model", metavar="MODEL", help="Model folder or Hub id.")
    parser.add_argument("folder", metavar="FOLDER", help="The new folder; jaxllm serve FOLDER serves it.")
    names = ("dtype", "load_format", "revision", "download_dir")
    flags = [flag for group in ENGINE.values() for flag in group if flag.name in names]
    add_flags(parser, {"Options": flags}, EngineConfig)
    return parser


def read(argv: Sequence[str]) -> tuple[EngineConfig, ServerOptions]:
    """The two option sets that `argv` asks for. Exits with a sentence, as argparse does, for what it refuses."""
    parser = server_parser()
    args = parser.parse(argv)
    if args.model_argument is not None:
        if args.model not in (None, args.model_argument):
            parser.error(f"two models are named, {args.model_argument} and --model {args.model}: name one")
        args.model = args.model_argument
    if args.trust_remote_code:
        parser.error("--trust-remote-code is not supported: jaxllm never runs code from a checkpoint; use a model that it knows itself")
    return EngineConfig(**values(args, EngineConfig)), ServerOptions(**values(args, ServerOptions))
