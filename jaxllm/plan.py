"""From what was asked (EngineConfig) to what will be done (Plan): lengths, pages, rows and the shapes to compile.

A Plan is made once, before anything is loaded, logged once, and never changes. It knows numbers only; which devices
there are and how much memory they have comes in as `Machine`.
"""

from dataclasses import dataclass, replace

from converters.model_config import ModelConfig
from jaxllm.config import KV_CACHE_DTYPES, EngineConfig
from jaxllm.request import MAX_BIAS, MAX_STOP_IDS, ConfigError

GIB = 2**30
PAGE_SIZE = 64  # measured best with the Mosaic kernels; whole pages are what prompts share
LARGE = 60 * GIB  # from this device memory on, steps are sized for throughput; below, weights need most of it
SLACK = 5 * GIB // 4  # the allocator's rounding, CUDA graphs, mailboxes
PACE = 4e13  # operations on prompts in a step while answers are streamed: 60 ms on an H200, the pause between two of their tokens
WORKSPACE = 128 * 2**20  # what XLA counts among a step's temporaries for cuBLAS, however small the step
# A dispatch takes the host 1 to 2 ms. A GPU reads 2.5 TB/s of a small model's weights, so those of less than 2 GB or so are done before:
# what goes out in one dispatch should keep the device busy for 4 ms, and newcomers waiting no longer.
DISPATCH = 4e-3 * 2.5e12
CPU_CACHE_BYTES = 1 * GIB  # what the KV cache may take on a CPU, where there is no device memory to divide


@dataclass(frozen=True, order=True)
class Bucket:
    """A step's compiled shape: `rows` row lanes and, after them, `chunk` lanes for prompt tokens.

    A scored bucket also returns the log-probability of every prompt token that runs in its chunk lanes.
    """

    chunk: int
    rows: int
    scored: bool = False

    def __str__(self) -> str:
        return f"step of {self.rows} rows and {self.chunk} prompt tokens" + (", scored" if self.scored else "")


@dataclass(frozen=True)
class Machine:
    """memory: what jaxllm may take on each device, in bytes; None on a CPU. peers: the devices may write into each other's memory."""

    platform: str
    kind: str
    count: int
    memory: int | None = None
    peers: bool = False


@dataclass(frozen=True)
class Plan:
    """What will be done. `num_pages` counts the pages a sequence may hold; the trash page comes on top."""

    dtype: str
    max_model_len: int
    page_size: int
    num_pages: int
    max_num_seqs: int
    buckets: tuple[Bucket, ...]
    scored: Bucket
    enable_prefix_caching: bool
    max_logprobs: int
    tensor_parallel_size: int
    decode_steps: int = 1  # tokens that a row decodes in one dispatch when nobody waits
    streamed_chunk: int | None = None  # prompt tokens a step takes at most while some answer is streamed; None: as many as ever
    kv_dtype: str | None = None  # of the pages, where it is not dtype
    step_bytes: int | None = None  # device memory set aside for the temporaries of one step; None on a CPU
    mailboxes: bool = False  # steps of few rows sum over the devices by writing into each other's memory

    @property
    def page_dtype(self) -> str:
        return self.kv_dtype or self.dtype

    @property
    def max_pages(self) -> int:
        """Pages of one sequence at most."""
        return -(-self.max_model_len // self.page_size)

    @property
    def capacity(self) -> int:
        """Tokens that the cache holds."""
        return self.num_pages * self.page_size

    def bucket(self, rows: int, chunk: int) -> Bucket:
        """The smallest compiled shape that holds so much."""
        return min(b for b in self.buckets if b.rows >= rows and b.chunk >= chunk)

    def without_padding(self, wide: int) -> "Plan":
        """This plan where steps of `wide` lanes and more leave out those that hold no token: with two of such shapes, the largest and one
        that decodes.
        """
        most = self.largest
        kept = [b for b in self.buckets if b.rows + b.chunk < wide or b in (most, replace(most, chunk=0))]
        return replace(self, buckets=tuple(kept))

    @property
    def largest(self) -> Bucket:
        """The shape that holds every decode and the most prompt tokens beside them."""
        return max(self.buckets)

    def __str__(self) -> str:
        return (
            f"{self.dtype}, {self.num_pages} pages of {self.page_size} tokens in {self.page_dtype}: maximum concurrency for "
            f"{self.max_model_len:,} tokens per request: {self.capacity / self.max_model_len:.2f}x; "
            f"at most {self.max_num_seqs} rows and {self.largest.chunk} prompt tokens a step, {self.decode_steps} decodes a dispatch, "
            f"{len(self.buckets) + 1} shapes"
        )


def make_plan(
    config: EngineConfig, model: ModelConfig, checkpoint_dtype: str, machine: Machine, weight_bytes: int, row_bytes: int = 0
) -> Plan:
    """`weight_bytes` is what the weights take on each device, `row_bytes` what a patch keeps there for each row.

    Raises ConfigError if the model does not fit the machine.
    """
    if machine.count < config.tensor_parallel_size:
        raise ConfigError(
            f"--tensor-parallel-size {config.tensor_parallel_size} wants as many devices, but this machine shows {machine.count}; "
            "lower it, or show more devices (CUDA_VISIBLE_DEVICES)"
        )
    dtype = choose_dtype(config.dtype, checkpoint_dtype)
    page_size = config.block_size or PAGE_SIZE
    rows = config.max_num_seqs or _default_rows(machine)
    longest = config.max_model_len or model.max_position
    if longest > model.max_position:
        raise ConfigError(
            f"--max-model-len {longest} is more than the {model.max_position} positions this model was made for; "
            "lower it, or raise max_position_embeddings by --hf-overrides"
        )
    wanted = model.max_position if longest < 0 else longest
    chunks, steps = _chunks(config, machine), config.num_scheduler_steps or min(_decode_steps(config, machine, weight_bytes), page_size)
    if not 1 <= steps <= page_size:
        raise ConfigError(f"--num-scheduler-steps must be from 1 to --block-size, which is {page_size}, but it is {steps}")
    kv_dtype = choose_kv_dtype(config.kv_cache_dtype)
    page_bytes = kv_page_bytes(model, page_size, kv_dtype or dtype, config.tensor_parallel_size)
    lanes = rows if machine.memory is None else -(-rows // 8) * 8  # a GPU's kernels for prompts take lanes by the eight
    scored = Bucket(min(chunks), min(lanes, 8), scored=True)
    buckets = _buckets(rows, lanes, chunks, config.enforce_eager, machine, dtype)
    step_bytes = _step_bytes(model, lanes, max(chunks), scored, dtype, config.tensor_parallel_size)
    beside = step_bytes + _kept_bytes(model, (*buckets, scored), rows, -(-wanted // page_size)) + (rows + 1) * row_bytes + SLACK
    pages = config.num_gpu_blocks_override or _num_pages(machine, rows, wanted, page_size, page_bytes, weight_bytes + beside)
    if pages * page_size < wanted:
        if config.max_model_len is None or longest > 0:
            raise ConfigError(
                f"one request of {wanted} tokens needs {-(-wanted // page_size)} pages of {page_size} tokens "
                f"({-(-wanted // page_size) * page_bytes / GIB:.2f} GiB), but after weights ({weight_bytes / GIB:.2f} GiB) and step "
                f"({beside / GIB:.2f} GiB) there is room for {max(pages, 0)}; lower --max-model-len, use --max-model-len auto, "
                "raise --gpu-memory-utilization or --tensor-parallel-size"
            )
        wanted = pages * page_size
        if wanted <= 0:
            raise ConfigError(f"the weights take {weight_bytes / GIB:.2f} GiB and leave no room for a single page")
    return Plan(
        dtype=dtype,
        max_model_len=wanted,
        page_size=page_size,
        num_pages=pages,
        max_num_seqs=rows,
        buckets=buckets,
        scored=scored,
        enable_prefix_caching=config.enable_prefix_caching,
        max_logprobs=config.max_logprobs,
        tensor_parallel_size=config.tensor_parallel_size,
        decode_steps=steps,
        streamed_chunk=config.max_num_batched_tokens or _paced(chunks, weight_bytes),
        kv_dtype=kv_dtype,
        step_bytes=None if machine.memory is None else step_bytes,
        mailboxes=machine.peers and config.tensor_parallel_size > 1 and not config.disable_custom_all_reduce,
    )


def choose_dtype(asked: str, checkpoint: str) -> str:
    names = {"half": "float16", "float": "float32", "auto": checkpoint}
    dtype = names.get(asked, asked)
    if dtype not in ("float16", "bfloat16", "float32"):
        raise ConfigError(f"dtype {dtype!r} is not supported; choose one of auto, half, float16, bfloat16, float, float32")
    return dtype


def choose_kv_dtype(asked: str) -> str | None:
    """The pages' dtype, None for the model's own."""
    if asked not in KV_CACHE_DTYPES:
        raise ConfigError(f"--kv-cache-dtype {asked!r} is not supported; choose one of {', '.join(KV_CACHE_DTYPES)}")
    return None if asked == "auto" else "float8_e4m3fn"


def dtype_bytes(dtype: str) -> int:
    return {"float32": 4, "float8_e4m3fn": 1}.get(dtype, 2)


def kv_page_bytes(model: ModelConfig, page_size: int, dtype: str, tp: int) -> int:
    """Bytes a page takes on each device, K and V of all layers."""
    return 2 * len(model.layers) * model.num_kv_heads // tp * page_size * model.head_dim * dtype_bytes(dtype)


def _default_rows(machine: Machine) -> int:
    if machine.memory is None:
        return 32
    return 1024 if machine.memory > LARGE else 256


def _chunks(config: EngineConfig, machine: Machine) -> list[int]:
    """Sizes of the prompt chunks, smallest first. A step pays for all lanes of its shape, so there are small ones too.

    448 tokens beside 64 rows are 512 lanes, which take as long as 449: 10.0 ms for the 8B on an H200, where 576 take 12.0.
    """
    sizes = (64, 512) if machine.memory is None else (448, 2048, 8192) if machine.memory > LARGE else (256, 512, 2048)
    most = config.max_num_batched_tokens or sizes[-1]
    if most < 1:
        raise ConfigError(f"--max-num-batched-tokens must be at least 1, but it is {most}")
    return [most] if config.enforce_eager else sorted({*(s for s in sizes if s < most), most})


def _decode_steps(config: EngineConfig, machine: Machine, weight_bytes: int) -> int:
    """On one GPU; a CPU's step takes longer than its dispatch, and loops over several devices were not measured."""
    if machine.memory is None or config.tensor_parallel_size > 1:
        return 1
    return max(1, min(8, int(DISPATCH / max(weight_bytes, 1))))


def _paced(chunks: list[int], weight_bytes: int) -> int:
    """The largest chunk whose products keep the pace: an operation a token for each byte of 16-bit weights."""
    return max([size for size in chunks if size * weight_bytes <= PACE], default=chunks[0])


def _buckets(rows: int, lanes: int, chunks: list[int], eager: bool, machine: Machine, dtype: str) -> tuple[Bucket, ...]:
    """Decode shapes in powers of two, closer where a padded row costs arithmetic, and each chunk size with a few sizes of rows.

    lanes: for the rows of the largest shapes. A row that is always alone decodes alone.

    On a CPU one row of 16 bits takes longer than eight: 26 ms a step of the default model instead of 7, and 3.3 in float32 (two cores).
    """
    most = lanes if rows > 1 else 1
    if eager:
        return tuple(sorted({Bucket(0, most), Bucket(chunks[-1], lanes)}))
    gpu = machine.memory is not None
    few = (1, 8, 32, 64, 128, 256, 384, 512, 768) if gpu else (1, 8) if dtype == "float32" else (8,)
    decode = {Bucket(0, min(r, most)) for r in (*few, most)}
    mixed = {Bucket(c, min(r, lanes)) for c in chunks for r in ((64, 256, lanes) if gpu else (8, lanes))}
    return tuple(sorted(decode | mixed))


def _num_pages(machine: Machine, rows: int, longest: int, page_size: int, page_bytes: int, taken: int) -> int:
    if machine.memory is not None:
        return (machine.memory - taken) // page_bytes - 1
    return min(rows * -(-longest // page_size), max(CPU_CACHE_BYTES // page_bytes, 1))


def _step_bytes(model: ModelConfig, rows: int, chunk: int, scored: Bucket, dtype: str, tp: int) -> int:
    """A bound on what any step or draw needs beside weights and cache; Runner holds XLA's own figure against it."""
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    d_ff = max([model.d_ff] + [layer.experts.d_ff * 4 for layer in model.layers if layer.experts])
    lanes = (rows + chunk) * (8 * model.d_model + 4 * heads // tp + 4 * d_ff // tp) * dtype_bytes(dtype)
    logits = 3 * max(rows, scored.rows + scored.chunk) * model.vocab_size * 4
    return max(2 * lanes, logits) + WORKSPACE


def _kept_bytes(model: ModelConfig, buckets: tuple[Bucket, ...], rows: int, max_pages: int) -> int:
    """What stays on the device between steps beside weights and cache: each row size's logits, and every slot's state."""
    ports = 4 * (model.vocab_size + model.d_model) * sum({bucket.rows for bucket in buckets})
    state = (rows + 1) * (3 * model.vocab_size + model.vocab_size // 8 + 4 * (max_pages + 2 * MAX_BIAS + MAX_STOP_IDS + 16))
    return ports + state
