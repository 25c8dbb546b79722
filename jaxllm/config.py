"""EngineConfig: what the user asked, with vLLM's flag names. Plain data, no JAX: `plan.py` decides what will be done."""

from dataclasses import dataclass, field
from typing import Any, Literal

ATTENTION_BACKENDS = ("auto", "portable", "sm90", "reference")
DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
KV_CACHE_DTYPES = ("auto", "fp8")
LOAD_FORMATS = ("auto", "safetensors", "pt", "orbax", "dummy")
SCHEDULING_POLICIES = ("fcfs", "priority")


@dataclass(frozen=True)
class EngineConfig:
    """Every option of the engine. None means: chosen by `plan` from the model and the machine, and logged.

    model: a folder or a Hub id; None is the model that ships in the package.
    max_model_len: prompt and answer together, in tokens; -1 ("auto") is the most that memory allows.
    gpu_memory_utilization: the fraction of each device's total memory that weights, cache and step may take together.
    block_size: tokens in a page of the KV cache.
    num_scheduler_steps: tokens that a row decodes in one dispatch while nobody waits for a place or computes a prompt. A row that ends
        earlier leaves the rest unused, and a newcomer waits for it. None: several for models whose step is shorter than its dispatch.
    max_num_batched_tokens: prompt tokens in a step. None: thousands while nobody waits for tokens one by one, else some 60 ms of them.
    attention_backend: which of pallas_kernels' implementations attends; auto is the fastest that was measured for the device.
    scheduling_policy: fcfs serves who came first; priority whose Request.priority is smallest.
    kv_cache_dtype: auto keeps keys and values in `dtype`; fp8 (e4m3, each number by itself) takes half the memory, and rounds them.
    """

    model: str | None = None
    tokenizer: str | None = None
    revision: str | None = None
    download_dir: str | None = None
    load_format: str = "auto"
    dtype: str = "auto"
    hf_overrides: dict[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    generation_config: str = "auto"  # auto: the model's own; "vllm": none; or a folder
    chat_template: str | None = None  # a file, or the template itself
    served_model_name: str | None = None
    seed: int = 0
    max_model_len: int | None = None
    tensor_parallel_size: int = 1
    disable_custom_all_reduce: bool = False  # GPUs sum by NCCL alone, not by writing into each other's memory
    gpu_memory_utilization: float = 0.9
    block_size: int | None = None
    kv_cache_dtype: str = "auto"
    attention_backend: str = "auto"
    num_gpu_blocks_override: int | None = None  # pages in the cache, whatever memory allows
    enable_prefix_caching: bool = True
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    num_scheduler_steps: int | None = None
    scheduling_policy: str = "fcfs"
    max_num_queued_reqs: int | None = None  # sequences that may wait for a row
    max_logprobs: int = 20
    disable_log_stats: bool = False  # of a server's engine process; Engine and LLM log none
    enforce_eager: bool = False  # few buckets, quick start
    device: Literal["auto", "cpu", "cuda"] = "auto"
