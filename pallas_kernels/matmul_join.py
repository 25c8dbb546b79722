"""What stands between two products of a decode step: the first one's parts are summed onto the residual stream, and normed for the next.

One program a row, in Pallas-Triton. P parts, N rows, D model.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt


def join(
    h_ND: Array, parts_PND: Array | None, norm_D: Array, *, eps: float, offset: float = 0.0, interpret: bool = False
) -> tuple[Array, Array]:
    """(h + the sum of the parts, that over its root mean square times (norm + offset)), both of h's dtype; normed is the rounded sum."""
    rows, size = h_ND.shape
    out = [jax.ShapeDtypeStruct(h_ND.shape, h_ND.dtype)] * (1 if parts_PND is None else 2)
    made = pl.pallas_call(
        partial(_kernel, parts=0 if parts_PND is None else parts_PND.shape[0], size=size, eps=eps, offset=offset),
        grid=(rows,),
        out_shape=out,
        compiler_params=plt.CompilerParams(num_warps=4 if size <= 2048 else 8, num_stages=1),
        interpret=interpret,
        name="join_norm",
    )(h_ND, norm_D, *([] if parts_PND is None else [parts_PND]))
    return (h_ND, made[0]) if parts_PND is None else (made[0], made[1])


def _kernel(h_ref, norm_ref, *refs, parts, size, eps, offset):
    row, feature_D = pl.program_id(0), jnp.arange(pl.next_power_of_2(size))
    live_D = None if feature_D.shape[0] == size else feature_D < size

    def load(ref, *index):
        if live_D is None:
            return plt.load(ref.at[*index, feature_D]).astype(jnp.float32)
        return plt.load(ref.at[*index, feature_D], mask=live_D, other=0.0).astype(jnp.float32)

    dtype = h_ref.dtype
    h_D, norm_D = load(h_ref, row), load(norm_ref)
    if parts:
        sum_D = load(refs[0], 0, row)
        for part in range(1, parts):
            sum_D += load(refs[0], part, row)
        h_D = (h_D + sum_D).astype(dtype)
        plt.store(refs[1].at[row, feature_D], h_D, mask=live_D)
        h_D = h_D.astype(jnp.float32)
    unit = lax.rsqrt(jnp.sum(h_D * h_D) / size + eps)
    plt.store(refs[-1].at[row, feature_D], (h_D * unit * (norm_D + offset)).astype(dtype), mask=live_D)
