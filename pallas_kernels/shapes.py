"""Named attention cases, shared by the tests and the benchmarks: a mixture of rows, and the shape of a model's heads.

M rows, T chunk lanes. Plain numbers, no JAX: whoever uses a case draws the arrays.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Heads:
    """Query heads, kv heads and features a head, as on one device."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Case:
    """One call of `paged_attention`. chunk_lens: 0 for a row that decodes; lengths: 0 if empty. pages: the pages' dtype, if not q's."""

    heads: Heads
    lengths: tuple[int, ...]
    chunk_lens: tuple[int, ...] = ()
    page_size: int = 64
    dtype: str = "bfloat16"
    window: int | None = None
    softcap: float | None = None
    spare: int = 0  # chunk lanes beyond those that rows own
    pages: str | None = None
    sinks: bool = False
    shared: int = 0  # pages that every row begins with

    @property
    def page_dtype(self) -> str:
        return self.pages or self.dtype

    @property
    def chunk(self) -> int:
        return sum(self.chunk_lens) + self.spare

    @property
    def decodes(self) -> bool:
        """Whether a row may decode: not if chunks are said to be all that there is."""
        chunks = self.chunk_lens or (0,) * len(self.lengths)
        return not any(chunks) or any(length and not chunk for length, chunk in zip(self.lengths, chunks, strict=True))


FP8 = "float8_e4m3fn"
LLAMA_8B, QWEN_3B, QWEN_05B = Heads(32, 8, 128), Heads(16, 2, 128), Heads(14, 2, 64)

# Each holds what once went wrong somewhere: empty rows, length 1, page borders, rows that many workers share.
CORRECT = {
    "decode": Case(LLAMA_8B, (1, 0, 63, 64, 65, 700, 0, 128, 3000)),
    "decode_float16": Case(LLAMA_8B, (5, 64, 257), dtype="float16"),
    "decode_window": Case(LLAMA_8B, (1, 0, 100, 129, 1000), window=128),
    "decode_softcap": Case(QWEN_3B, (30, 500), softcap=20.0),
    "decode_group_7": Case(QWEN_05B, (1, 640, 77, 0), page_size=64),
    "decode_page_16": Case(QWEN_05B, (1, 15, 16, 17, 333), page_size=16),
    "decode_page_128": Case(QWEN_3B, (1, 127, 129, 1000), page_size=128),
    "decode_mha": Case(Heads(4, 4, 64), (9, 200)),
    "decode_group_16": Case(Heads(32, 2, 128), (9, 200), window=40, softcap=30.0),
    "mixed": Case(LLAMA_8B, (300, 65, 0, 500, 8), (0, 65, 0, 100, 1), spare=10),
    "mixed_window_page_16": Case(QWEN_05B, (300, 65, 0, 500), (0, 65, 0, 100), page_size=16, window=70, spare=2),
    "prefill": Case(QWEN_05B, (333,), (333,)),
    "prefill_prefix_softcap": Case(QWEN_3B, (900, 128), (200, 128), softcap=15.0),
    "head_dim_80": Case(Heads(4, 2, 80), (9, 200, 150), (0, 0, 40)),
    "head_dim_8": Case(Heads(4, 1, 8), (9, 200, 150), (0, 0, 40), page_size=16),
    "head_dim_256": Case(Heads(8, 4, 256), (9, 200, 150), (0, 0, 40), window=99, softcap=50.0),
    "float32": Case(Heads(6, 2, 64), (9, 200, 150), (0, 0, 40), dtype="float32"),
    "sinks": Case(Heads(16, 2, 64), (1, 0, 200, 150, 900), (0, 0, 0, 40, 0), window=128, sinks=True),
    "sinks_softcap": Case(QWEN_3B, (77, 640), (0, 30), softcap=20.0, sinks=True),
    "fp8": Case(LLAMA_8B, (1, 0, 63, 64, 65, 700, 3000), (0, 0, 0, 0, 0, 100, 0), pages=FP8, spare=3),
    "fp8_page_16": Case(QWEN_05B, (333, 17, 64), (0, 0, 64), page_size=16, pages=FP8, window=70, sinks=True),
    "fp8_float16": Case(Heads(8, 4, 96), (9, 200, 150), (0, 0, 40), dtype="float16", pages=FP8, softcap=30.0),
    "shared_pages": Case(LLAMA_8B, (300, 129, 1000, 128, 131), (0, 1, 40, 0, 3), shared=2),
    "prefill_group_1": Case(Heads(4, 4, 128), (300, 7, 150), (70, 0, 130), page_size=32, window=50, spare=5),
    "prefill_group_3": Case(Heads(6, 2, 128), (500, 90), (300, 90), page_size=128, dtype="float16"),
    "prefill_group_5": Case(Heads(10, 2, 128), (210, 30), (210, 9), spare=2),
    "prefill_group_6": Case(Heads(12, 2, 64), (333, 40), (100, 40), page_size=32, softcap=20.0),
    "prefill_group_16": Case(Heads(16, 1, 64), (700, 64), (130, 64), page_size=16, spare=1),
    "long": Case(Heads(2, 1, 64), (131_072, 1, 40_000)),
    "long_prefix": Case(Heads(2, 1, 64), (131_072, 70_000), (64, 0), window=4096),
}

# Small enough for an interpreter.
SMALL = {
    "decode": Case(Heads(4, 2, 64), (150, 0, 3, 64), page_size=64),
    "decode_group_3_window": Case(Heads(6, 2, 64), (140, 20), page_size=16, window=70, softcap=5.0),
    "mixed": Case(Heads(6, 2, 24), (70, 37, 0, 5), (0, 20, 0, 5), page_size=16, dtype="float32", window=30, spare=3),
    "mixed_softcap": Case(Heads(4, 1, 16), (33, 100), (0, 70), page_size=32, softcap=9.0),
    "mixed_sinks": Case(Heads(6, 2, 24), (70, 37, 0, 5), (0, 20, 0, 5), page_size=16, dtype="float16", window=30, spare=3, sinks=True),
    "mixed_fp8": Case(Heads(6, 2, 40), (70, 37, 0, 150), (0, 20, 0, 5), page_size=16, spare=3, sinks=True, pages=FP8),
    "shared_pages": Case(Heads(2, 1, 16), (150, 64, 80), (0, 0, 20), page_size=32, shared=2),
    "mixed_window_many_blocks": Case(Heads(2, 1, 8), (300, 290), (0, 140), page_size=64, window=100),
    "nobody": Case(Heads(4, 2, 64), (0, 0, 0), (0, 0, 0), spare=40),  # a warm-up's step
    "only_decodes": Case(Heads(4, 2, 64), (40, 0, 3), (0, 0, 0), spare=40),  # in a shape that has chunk lanes
    "prefill_sm90": Case(Heads(4, 1, 64), (40, 270, 0, 150), (40, 50, 0, 40), spare=9),
    "prefill_sm90_window": Case(Heads(7, 1, 64), (300, 5), (40, 5), page_size=16, window=100, softcap=15.0),
    "prefill_sm90_mha": Case(Heads(2, 2, 64), (140, 9), (70, 0), page_size=128, dtype="float16"),
}

# What the kernel bench times. Rows of 4096 tokens and the like are FlashAttention-3's published shapes, the others are the engine's.
DECODE = {
    "8b_1x8192": Case(LLAMA_8B, (8192,)),
    "8b_16x4096": Case(LLAMA_8B, (4096,) * 16),
    "8b_64x4096": Case(LLAMA_8B, (4096,) * 64),
    "8b_256x1024": Case(LLAMA_8B, (1024,) * 256),
    "8b_64x4096_fp8": Case(LLAMA_8B, (4096,) * 64, pages=FP8),
    "8b_64x640": Case(LLAMA_8B, (640,) * 64),
    "3b_256x1024": Case(QWEN_3B, (1024,) * 256),
    "0.5b_256x1024": Case(QWEN_05B, (1024,) * 256),
    "0.5b_64x640": Case(QWEN_05B, (640,) * 64),
    # Lengths from 1 to 32k, and a uniform batch of as many bytes.
    "8b_mixed_lengths": Case(LLAMA_8B, tuple(round(32768 ** (row / 63)) for row in range(64))),
    "8b_equal_lengths": Case(LLAMA_8B, (sum(round(32768 ** (row / 63)) for row in range(64)) // 64,) * 64),
}

PREFILL = {
    f"{model}_{tokens}": Case(heads, (tokens,), (tokens,))
    for model, heads in (("8b", LLAMA_8B), ("0.5b", QWEN_05B))
    for tokens in (2048, 8192)
} | {"8b_ragged_16x512": Case(LLAMA_8B, tuple(512 + 1024 * row for row in range(16)), (512,) * 16)}  # cached prefixes of 0 to 15k
