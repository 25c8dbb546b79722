"""Kernels for serving language models: paged attention and the write of its KV pages."""

from pallas_kernels.attention import capability_of, implementation_for, paged_attention, plan_work
from pallas_kernels.kv_write import write_kv
from pallas_kernels.work import Rows, Work

__all__ = ["Rows", "Work", "capability_of", "implementation_for", "paged_attention", "plan_work", "write_kv"]
