"""Changing a network's activations at named sites: a function given before anything is compiled, and data that each request may bring.

The function sees one token at a time and the data of that token's own row, so what one row brings cannot reach another.
The same sites exist in the dense network (`Model.forward`) and in the engine's paged one. N tokens, S rows, D model.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax import Array

from jaxllm.request import ConfigError, RequestError

SITES = ("resid_pre", "attn_out", "mlp_out", "resid_post")
Site = tuple[int, str]  # a layer, and one of SITES

POSITION = "position"


@dataclass(frozen=True, eq=False)
class Patch:
    """`function(layer, site, value_D, data) -> value_D` replaces one token's activation at each of `sites`.

    layer, site: Python values, so the function may branch on them. The sites, all [D]: resid_pre, the residual stream as a
    layer gets it; attn_out and mlp_out, what attention and MLP add to it (after their output norms, if the model has any);
    resid_post, the stream as the layer leaves it.
    data: the names, shapes and types of what a row brings, with the values of rows that bring nothing: choose them so that the
    function changes nothing. It gets them by name, and with them "position", the token's place in its sequence (int32).
    sites: pairs of layer and site; None is every site of every layer. A layer with a site is compiled for itself, so name few.
    Raises ConfigError for a site that there is not, or a name that is taken.
    """

    function: Callable[[int, str, Array, dict[str, Array]], Array]
    data: Mapping[str, Any] = field(default_factory=dict)
    sites: Collection[Site] | None = None

    def __post_init__(self):
        object.__setattr__(self, "data", {name: _array(value) for name, value in self.data.items()})
        object.__setattr__(self, "sites", None if self.sites is None else frozenset((int(layer), site) for layer, site in self.sites))
        if POSITION in self.data:
            raise ConfigError(f"a patch's data cannot be named {POSITION!r}: that is the token's place, which every patch gets")
        for _, site in self.sites or ():
            if site not in SITES:
                raise ConfigError(f"there is no site {site!r} in a layer; there are {', '.join(SITES)}")

    def check(self, layers: int) -> None:
        """Raises ConfigError if a site's layer is not among a network's."""
        for layer, site in self.sites or ():
            if not 0 <= layer < layers:
                raise ConfigError(f"the patch names {site!r} of layer {layer}, but the model has layers 0 to {layers - 1}")

    def visits(self, layer: int) -> bool:
        return self.sites is None or any(at == layer for at, _ in self.sites)

    @property
    def row_bytes(self) -> int:
        """What the engine keeps for each row."""
        return sum(value.nbytes for value in self.data.values())

    def row(self, given: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
        """A row's data, complete and on the host. Raises RequestError for a name or a shape that the patch does not have."""
        return {name: np.asarray(value, self.data[name].dtype) for name, value in self.complete(given).items()}

    def complete(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """The same, with what is given as it was given: it may be traced."""
        for name, value in (given or {}).items():
            if name not in self.data:
                raise RequestError(f"the patch takes no data named {name!r}; it takes {', '.join(self.data) or 'none'}", "patch")
            if (shape := np.shape(value)) != self.data[name].shape:
                raise RequestError(f"the patch's {name!r} has shape {self.data[name].shape}, but what is given has {shape}", "patch")
        return {name: (given or {}).get(name, value) for name, value in self.data.items()}

    def digest(self, given: Mapping[str, Any] | None) -> bytes:
        """Names a row's data, so that only rows with the same data share pages. Empty for one that brings nothing."""
        if not given:
            return b""
        return hashlib.blake2b(b"".join(value.tobytes() for value in self.row(given).values()), digest_size=16).digest()


def _array(value: Any) -> np.ndarray:
    """In the types that JAX keeps: of 64 bits, 32."""
    array = np.asarray(value)
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Patching:
    """A patch with the data of the rows at hand. Row slot_N[n] is token n's."""

    data_S: dict[str, Array]
    slot_N: Array
    position_N: Array
    patch: Patch = field(metadata={"static": True})

    def __call__(self, layer: int, site: str, value_ND: Array) -> Array:
        """`value_ND` as the patch has it at this site, in its own type. Raises ConfigError if that has another shape."""
        if self.patch.sites is not None and (layer, site) not in self.patch.sites:
            return value_ND

        def one(value_D: Array, slot: Array, position: Array) -> Array:
            row = {name: value_S[slot] for name, value_S in self.data_S.items()}
            return self.patch.function(layer, site, value_D, row | {POSITION: position})

        patched_ND = jax.vmap(one)(value_ND, self.slot_N, self.position_N)
        if patched_ND.shape != value_ND.shape:
            raise ConfigError(
                f"the patch makes {patched_ND.shape[1:]} of {site!r} in layer {layer}, which is {value_ND.shape[1:]}; "
                "it must return the shape that it was given"
            )
        return patched_ND.astype(value_ND.dtype)
