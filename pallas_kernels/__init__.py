"""Kernels for serving language models: paged attention, the write of its KV pages, a step's linear layers, and the draw of tokens."""

from pallas_kernels.attention import capability_of, implementation_for, paged_attention, plan_work
from pallas_kernels.kv_write import turn_and_write, write_kv
from pallas_kernels.matmul import WIDE_ROWS, Linears, ManyRows, Norm, Product, Stream, head_for, linears_for
from pallas_kernels.sampling import Choice, draw
from pallas_kernels.work import Rows, Work

__all__ = [
    "WIDE_ROWS", "Choice", "Linears", "ManyRows", "Norm", "Product", "Rows", "Stream", "Work", "capability_of", "draw", "head_for",
    "implementation_for", "linears_for", "paged_attention", "plan_work", "turn_and_write", "write_kv",
]  # fmt: skip
