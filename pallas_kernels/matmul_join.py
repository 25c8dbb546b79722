"""What stands between two products of a decode step: the first one's parts are summed onto the residual stream, and normed for the next.

A program takes a row, or several, in Pallas-Triton. P parts, N rows, D model.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.work import each_live, programs


def join(
    h_ND: Array,
    parts_PND: Array | None,
    norm_D: Array,
    *,
    eps: float,
    offset: float = 0.0,
    live_3: Array | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """(h + the sum of the parts, that over its root mean square times (norm + offset)), both of h's dtype; normed is the rounded sum.

    live_3: `work.live`, whose empty lanes then hold anything; None if all are wanted.
    """
    rows, size = h_ND.shape
    out = [jax.ShapeDtypeStruct(h_ND.shape, h_ND.dtype)] * (1 if parts_PND is None else 2)
    extras = {name: x for name, x in (("parts", parts_PND), ("live", live_3)) if x is not None}
    made = pl.pallas_call(
        partial(_kernel, names=tuple(extras), size=size, eps=eps, offset=offset),
        grid=(programs(rows, live_3),),
        out_shape=out,
        compiler_params=plt.CompilerParams(num_warps=4 if size <= 2048 else 16, num_stages=1),
        interpret=interpret,
        name="join_norm",
    )(h_ND, norm_D, *extras.values())
    return (h_ND, made[0]) if parts_PND is None else (made[0], made[1])


def _kernel(h_ref, norm_ref, *refs, names, size, eps, offset):
    extras, outputs = dict(zip(names, refs, strict=False)), refs[len(names) :]
    each_live(extras.get("live"), lambda row: _join(h_ref, norm_ref, extras.get("parts"), outputs, row, size, eps, offset))


def _join(h_ref, norm_ref, parts_ref, outputs, row, size, eps, offset):
    feature_D = jnp.arange(pl.next_power_of_2(size))
    live_D = None if feature_D.shape[0] == size else feature_D < size

    def load(ref, *index):
        if live_D is None:
            return plt.load(ref.at[*index, feature_D]).astype(jnp.float32)
        return plt.load(ref.at[*index, feature_D], mask=live_D, other=0.0).astype(jnp.float32)

    dtype = h_ref.dtype
    h_D, norm_D = load(h_ref, row), load(norm_ref)
    if parts_ref is not None:
        sum_D = load(parts_ref, 0, row)
        for part in range(1, parts_ref.shape[0]):
            sum_D += load(parts_ref, part, row)
        h_D = (h_D + sum_D).astype(dtype)
        plt.store(outputs[0].at[row, feature_D], h_D, mask=live_D)
        h_D = h_D.astype(jnp.float32)
    unit = lax.rsqrt(jnp.sum(h_D * h_D) / size + eps)
    plt.store(outputs[-1].at[row, feature_D], (h_D * unit * (norm_D + offset)).astype(dtype), mask=live_D)
