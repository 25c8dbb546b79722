"""Kernels for serving language models: paged attention, the write of its KV pages, and the draw of tokens."""

from pallas_kernels.attention import capability_of, implementation_for, paged_attention, plan_work
from pallas_kernels.kv_write import write_kv
from pallas_kernels.sampling import Choice, draw
from pallas_kernels.work import Rows, Work

__all__ = ["Choice", "Rows", "Work", "capability_of", "draw", "implementation_for", "paged_attention", "plan_work", "write_kv"]
