"""The fused linear layers of a step over several devices: each device's kernels see its own part of the weights, as if it were alone.

What a layer adds to the residual stream is summed over the devices, twice a layer (Megatron-LM, arXiv:1909.08053): attention's output by
heads, the MLP's by features. N rows, D model, F features of a product.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import Mesh

from jaxllm.parallel import RULES, on_each, spec
from pallas_kernels import ManyRows, Norm, Stream

WHOLE = spec(())  # the same on every device
FEATURES = spec((None, "mlp"))  # of a product that a device made its part of, and of the weights that read it


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ShardedLinears:
    """The verbs of `each`, a device's linears, for arrays that lie on all devices of `mesh`."""

    each: ManyRows = field(metadata={"static": True})
    mesh: Mesh = field(metadata={"static": True})

    def norm(self, stream: Stream, norm: Norm) -> tuple[Stream, Any]:
        def local(stream, weight_D):
            return self.each.norm(stream, norm._replace(weight_D=weight_D))

        return on_each(self.mesh, local, (WHOLE, WHOLE), WHOLE)(stream, norm.weight_D)

    def gated(self, normed: Any, weight_FD: Array, act: Callable[[Array], Array]) -> Array:
        """[N, F / 2], each device's features one after the other."""

        def local(normed, weight_FD):
            return self.each.gated(normed, weight_FD, act)

        return on_each(self.mesh, local, (WHOLE, spec(("mlp", None))), FEATURES)(normed, weight_FD)

    def add(self, stream: Stream, x_NF: Array, weight_DF: Array) -> Stream:
        """The devices' parts are summed in the stream's dtype, as those of plain products are."""

        def local(stream, x_NF, weight_DF):
            mine_ND = self.each.product(x_NF, weight_DF).sum(0).astype(stream.h_ND.dtype)
            return Stream(stream.h_ND, lax.psum(mine_ND, RULES["mlp"])[None])

        return on_each(self.mesh, local, (WHOLE, FEATURES, FEATURES), WHOLE)(stream, x_NF, weight_DF)

    def finish(self, stream: Stream, norm: Norm) -> Array:
        return self.norm(stream, norm)[1]
