"""The fused linear layers of a step over several devices: each device's kernels see its own part of the weights, as if it were alone.

What a layer adds to the residual stream is summed over the devices, twice a layer (Megatron-LM, arXiv:1909.08053): attention's output by
heads, the MLP's by features. N rows, D model, F features of a product, W devices.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh

from jaxllm.parallel import RULES, on_each, sharding, spec
from jaxllm.request import ConfigError
from pallas_kernels import ManyRows, Norm, Stream, join_devices

WHOLE = spec(())  # the same on every device
FEATURES = spec((None, "mlp"))  # of a product that a device made its part of, and of the weights that read it
OWN = spec(("devices",))  # one after the other


@dataclass(frozen=True)
class Mailboxes:
    """Memory that the devices write into, each into everybody's, and what a step must be told of it.

    A step's kernels know it by its addresses, so whoever runs steps keeps it.
    """

    memory_WX: Array
    addresses_WV2: Array

    @classmethod
    def make(cls, mesh: Mesh, size: int) -> "Mailboxes":
        """Empty ones, for a model of `size`."""
        shape, place = (mesh.size, join_devices.words(size, mesh.size)), sharding(mesh, ("devices",))
        memory_WX = jax.jit(lambda: jnp.zeros(shape, jnp.int32), out_shardings=place)()
        return cls(memory_WX, jax.device_put(join_devices.addresses(memory_WX), place))

    def check(self, mesh: Mesh, size: int, dtype: str) -> None:
        """Raises ConfigError unless every device finds there what all put there: numbers that no rounding changes, twice in each place.

        A driver's word that devices reach each other is not enough: what lies between them may lose what they write.
        """

        def local(h_ND, parts_1ND, norm_D, addresses_1V2):
            found_ND, _ = join_devices.join(h_ND, parts_1ND, norm_D, addresses_1V2[0], eps=1.0)
            # The sum that is not ours also has all devices load their kernels before one of them waits for the others.
            return (found_ND == h_ND + lax.psum(parts_1ND[0], RULES["devices"])).all()[None]

        run, random = jax.jit(on_each(mesh, local, (WHOLE, OWN, WHOLE, OWN), OWN)), np.random.default_rng(0)
        for _ in range(4):
            h_ND, parts_WND = (random.integers(-8, 9, (*lead, 8, size)).astype(dtype) for lead in ((), (mesh.size,)))
            if not np.asarray(run(h_ND, parts_WND, np.ones(size, dtype), self.addresses_WV2)).all():
                raise ConfigError(
                    f"{mesh.size} GPUs that should write into each other's memory do not find there what they wrote; "
                    "start with --disable-custom-all-reduce"
                )

    @staticmethod
    def addresses_shape(mesh: Mesh) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((mesh.size, mesh.size + 1, 2), jnp.int32, sharding=sharding(mesh, ("devices",)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ShardedLinears:
    """The verbs of `each`, a device's linears, for arrays that lie on all devices of `mesh`.

    addresses_WV2: of mailboxes. With them the devices' parts stay in the stream, and are summed by the kernel that norms it; without,
    they are summed at once, by XLA.
    """

    each: ManyRows = field(metadata={"static": True})
    mesh: Mesh = field(metadata={"static": True})
    addresses_WV2: Array | None = None

    def norm(self, stream: Stream, norm: Norm) -> tuple[Stream, Any]:
        def local(stream, weight_D, addresses_1V2):
            if addresses_1V2 is None or stream.parts_PND is None:
                return self.each.norm(stream, norm._replace(weight_D=weight_D))
            how = dict(eps=norm.eps, offset=norm.offset)
            h_ND, normed_ND = join_devices.join(*stream, weight_D, addresses_1V2[0], **how)
            return Stream(h_ND), normed_ND

        return on_each(self.mesh, local, (self._stream, WHOLE, OWN), WHOLE)(stream, norm.weight_D, self.addresses_WV2)

    def gated(self, normed: Any, weight_FD: Array, act: Callable[[Array], Array]) -> Array:
        """[N, F / 2], each device's features one after the other."""

        def local(normed, weight_FD):
            return self.each.gated(normed, weight_FD, act)

        return on_each(self.mesh, local, (WHOLE, spec(("mlp", None))), FEATURES)(normed, weight_FD)

    def add(self, stream: Stream, x_NF: Array, weight_DF: Array) -> Stream:
        """The devices' parts are summed in the stream's dtype, as those of plain products are."""

        def local(stream, x_NF, weight_DF):
            parts_PND = self.each.product(x_NF, weight_DF)
            if self.addresses_WV2 is not None:
                return Stream(stream.h_ND, parts_PND)
            return Stream(stream.h_ND, lax.psum(parts_PND.sum(0).astype(stream.h_ND.dtype), RULES["mlp"])[None])

        return on_each(self.mesh, local, (self._stream, FEATURES, FEATURES), self._stream)(stream, x_NF, weight_DF)

    def finish(self, stream: Stream, norm: Norm) -> Array:
        return self.norm(stream, norm)[1]

    @property
    def _stream(self) -> Any:
        specs: Any = Stream  # of what a stream holds
        return WHOLE if self.addresses_WV2 is None else specs(WHOLE, OWN)
