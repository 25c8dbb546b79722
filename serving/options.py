"""The flags of `jaxllm serve`: one table, in which a flag is a field of EngineConfig or ServerOptions with a sentence and a way to read it.

vLLM's names wherever the meaning is vLLM's. Defaults are not written here: they are the dataclasses'. Imports neither JAX nor FastAPI.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxllm.config import ATTENTION_BACKENDS, DTYPES, KV_CACHE_DTYPES, LOAD_FORMATS, SCHEDULING_POLICIES, EngineConfig
from jaxllm.request import ConfigError
from serving.flags import Flag, Parser, add_flags, fraction, human_bytes, human_length, json_object, seconds, values, whole
from serving.parsers.table import REASONING_PARSERS, TOOL_PARSERS


@dataclass(frozen=True)
class ServerOptions:
    """How the server listens and whom it answers. Times are seconds."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_server_count: int = 1
    disable_page: bool = False
    api_key: tuple[str, ...] = ()
    api_key_file: str | None = None
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_ca_certs: str | None = None
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    enable_auto_tool_choice: bool = False
    strict: bool = False
    max_body_bytes: int = 32 * 2**20
    receive_timeout: float = 60.0
    shutdown_timeout: float = 10.0
    restart_engine: bool = False
    enable_admin_routes: bool = False
    profile_dir: str = "jaxllm-profile"
    enable_log_requests: bool = False
    otlp_traces_endpoint: str | None = None

    def keys(self) -> tuple[str, ...]:
        """Every key, those in the file too: one a line, # begins a comment. Raises ConfigError if the file gives none."""
        if self.api_key_file is None:
            return self.api_key
        try:
            lines = Path(self.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-key-file {self.api_key_file} cannot be read: {error}") from None
        found = [key for line in lines if (key := line.partition("#")[0].strip())]
        if not found:
            raise ConfigError(f"--api-key-file {self.api_key_file} holds no key: write one a line")
        return (*self.api_key, *found)


SERVER = {
    "Server": [
        Flag("host", "Address to listen on; 0.0.0.0 answers other machines too.", metavar="ADDRESS"),
        Flag("port", "Port to listen on; 0 takes a free one.", whole(0, 65535), "PORT"),
        Flag("api_server_count", "Processes that speak HTTP; one streams some 40,000 tokens a second.", whole(1, 64), "COUNT"),
        Flag("disable_page", "Do not serve the chat page at /.", "switch"),
        Flag("ssl_certfile", "Certificate in PEM, with its chain; serves https.", metavar="FILE"),
        Flag("ssl_keyfile", "The certificate's private key, if it is in a file of its own.", metavar="FILE"),
        Flag("ssl_ca_certs", "Serve only clients with a certificate signed by one of these.", metavar="FILE"),
    ],
    "Who is served": [
        Flag("api_key", "Serve only clients that send this key, or one of several.", "list", "KEY", unset="everybody is served"),
        Flag("api_key_file", "File with one key a line.", metavar="FILE"),
        Flag("allowed_origins", "Web origins whose pages may call the server; * is all.", "list", "ORIGIN"),
        Flag("allowed_methods", "HTTP methods such pages may use.", "list", "METHOD"),
        Flag("allowed_headers", "HTTP headers such pages may send.", "list", "HEADER"),
        Flag("allow_credentials", "Let such pages send cookies.", "switch"),
    ],
    "Tools and reasoning": [
        Flag("tool_call_parser", "How this model writes tool calls; auto looks into its chat template.", ("auto", "none", *TOOL_PARSERS)),
        Flag("reasoning_parser", "How this model marks its thinking; auto looks likewise.", ("auto", "none", *REASONING_PARSERS)),
        Flag(
            "enable_auto_tool_choice",
            "Do not start without a tool-call parser; tool choice auto itself is always on.",
            "switch",
        ),
    ],
    "Limits and faults": [
        Flag("strict", "Refuse unknown fields in place of naming them in a header.", "switch"),
        Flag("max_body_bytes", "Largest request body: 32M, 500k.", human_bytes, "BYTES"),
        Flag("receive_timeout", "Seconds in which a request must have arrived.", seconds, "SECONDS"),
        Flag("shutdown_timeout", "Seconds that running requests get to end after a stop signal.", seconds, "SECONDS"),
        Flag("restart_engine", "Start the engine again when its process dies, in place of exiting.", "switch"),
    ],
    "Watching": [
        Flag("enable_log_requests", "Log a line for every request when it ends.", "switch"),
        Flag("otlp_traces_endpoint", "Send OpenTelemetry spans to this URL, over HTTP; needs jaxllm[otel].", metavar="URL"),
        Flag("enable_admin_routes", "Offer /reset_prefix_cache, /start_profile and /stop_profile.", "switch"),
        Flag("profile_dir", "Folder that profiles are written to.", metavar="FOLDER"),
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
        Flag("disable_log_stats", "No log line with the engine's figures every 10 s.", "switch"),
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
        Flag("disable_custom_all_reduce", "Add up what GPUs made by NCCL alone, not in each other's memory.", "switch"),
        Flag("gpu_memory_utilization", "Fraction of each GPU's memory to use in all.", fraction, "FRACTION"),
        Flag("block_size", "Tokens in a page of the KV cache.", whole(1), "TOKENS", "chosen for the device"),
        Flag("kv_cache_dtype", "Type of cached keys and values: fp8 holds twice as many tokens; auto is --dtype.", KV_CACHE_DTYPES),
        Flag("attention_backend", "Attention kernels to run; auto takes the fastest for the device.", ATTENTION_BACKENDS),
        Flag("num_gpu_blocks_override", "Pages in the KV cache, whatever memory allows.", whole(1), "COUNT", "from memory"),
        Flag("enable_prefix_caching", "Keep finished prompts' pages for prompts that begin alike.", "switch"),
    ],
    "Batching": [
        Flag("scheduling_policy", "Who is served first: who came first, or the request's priority.", SCHEDULING_POLICIES),
        Flag("max_num_queued_reqs", "Most sequences that may wait for a row; further requests get a 429.", whole(0), "COUNT", "no limit"),
        Flag("max_num_seqs", "Most sequences that run at once.", whole(1), "COUNT", "from memory and device"),
        Flag("max_num_batched_tokens", "Most tokens in one step.", whole(1), "TOKENS", "from memory and device"),
        Flag("num_scheduler_steps", "Tokens a row decodes in one dispatch when nobody waits.", whole(1), "COUNT", "from model and device"),
    ],
}


def server_parser() -> Parser:
    """`jaxllm serve`: positional MODEL or --model, then the flags of ServerOptions and EngineConfig."""
    parser = Parser(
        prog="jaxllm serve",
        usage="jaxllm serve [MODEL] [options]",
        description="Serve a model over OpenAI's HTTP API. Every option may also stand in the --config file or in an environment variable: "
        "JAXLLM_MAX_MODEL_LEN is --max-model-len. The command line comes first, then the file, then the environment.",
    )
    parser.add_argument("model_argument", nargs="?", metavar="MODEL", help="Model folder or Hub id. Default: the model in the package.")
    parser.add_argument("--config", metavar="FILE", help="YAML file with options by name, such as max-model-len: 8k. Default: none.")
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
    """The two option sets that `argv`, the --config file and the environment ask for.

    Exits with a sentence, as argparse does, for what it refuses.
    """
    parser = server_parser()
    args = parser.parse(argv)
    if args.model_argument is not None:
        if args.model not in (None, args.model_argument):
            parser.error(f"two models are named, {args.model_argument} and --model {args.model}: name one")
        args.model = args.model_argument
    refuse_remote_code(parser, args)
    if args.ssl_certfile is None and (args.ssl_keyfile or args.ssl_ca_certs):
        parser.error("--ssl-keyfile and --ssl-ca-certs are of no use without --ssl-certfile")
    return EngineConfig(**values(args, EngineConfig)), ServerOptions(**values(args, ServerOptions))


def refuse_remote_code(parser: Parser, args: argparse.Namespace) -> None:
    """Exits with a sentence if it is asked for."""
    if args.trust_remote_code:
        parser.error("--trust-remote-code is not supported: jaxllm never runs code from a checkpoint; use a model that it knows itself")
