"""Launching the next kernel of a CUDA graph before this one has ended, in Pallas-Triton, from Hopper on.

XLA gives its kernels and Pallas-Triton's programmatic edges, and each begins with a wait for the end of the one before. So a launch that
comes early only takes the time that a launch takes out of the way; nothing is read before it is written. (PTX ISA, griddepcontrol.)
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import triton as plt


def launch_next(x: Array, now: Any, *, pack: int = 1) -> Array:
    """x itself, float32. Once all programs of the kernel have ended or come by with `now`, the next kernel is launched.

    now: whether this is the time, a number or an array of them that broadcasts to x. pack: elements of x that each thread has at least.
    """
    move = "".join(f"mov.b32 ${i}, ${pack + i};" for i in range(pack))
    asm = f"{{ .reg .pred p; setp.ne.b32 p, ${2 * pack}, 0; @p griddepcontrol.launch_dependents; {move} }}"
    now = jnp.broadcast_to(jnp.asarray(now, jnp.int32), x.shape)
    constraints = ",".join(["=f"] * pack + ["f"] * pack + ["r"] * pack)
    result = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return plt.elementwise_inline_asm(asm, args=[x, now], constraints=constraints, pack=pack, result_shape_dtypes=[result])[0]
