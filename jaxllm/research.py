"""A model as a pure function of its parameters, for research: `load` gives the function and the parameters that the engine serves.

    model, params = jaxllm.load("path/or/hub-id")
    logits_NV = model.forward(params, model.tokenizer.encode("Once upon a time"))

The network is the engine's own decoder with plain attention over one sequence instead of pages (`DenseContext`). Everything may
be jitted, differentiated and vmapped. N tokens, D model, Q query heads, V vocab.
"""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from converters.checkpoint import Checkpoint
from converters.model_config import ModelConfig
from jaxllm.config import EngineConfig
from jaxllm.decoder import ATTENTION, Decoder, DenseContext
from jaxllm.devices import set_flags
from jaxllm.loading import load_params
from jaxllm.parallel import make_mesh
from jaxllm.patch import SITES, Patch, Patching, Site
from jaxllm.plan import choose_dtype
from jaxllm.request import ConfigError
from jaxllm.source import as_config_error, load_tokenizer, open_model
from jaxllm.text import Tokenizer
from jaxllm.weights import Given, Params

Tokens = Array | np.ndarray | Sequence[int]


@dataclass(frozen=True, eq=False)
class Model:
    """What does not change while parameters do: the network's shape, its tokenizer, and the devices it lies on."""

    config: ModelConfig
    tokenizer: Tokenizer | None
    mesh: Mesh
    checkpoint: Checkpoint

    def forward(self, params: Params, tokens_N: Tokens, *, patch: Patch | None = None, data: Mapping[str, Any] | None = None) -> Array:
        """Logits [N, V] float32: row n is about the token that follows token n.

        patch, data: as in the engine; the data may be traced, so that a steering vector can be learned.
        A sequence may be padded at its end: no token sees a later one.
        """
        return self.activations(params, tokens_N, (), patch=patch, data=data)[0]

    def logprobs(self, params: Params, tokens_N: Tokens, *, patch: Patch | None = None, data: Mapping[str, Any] | None = None) -> Array:
        """Log-probabilities [N - 1] float32: of each token after the first, given all before it."""
        logits_NV = self.forward(params, tokens_N, patch=patch, data=data)
        table_NV = jax.nn.log_softmax(logits_NV[:-1], -1)
        return jnp.take_along_axis(table_NV, jnp.asarray(tokens_N)[1:, None], -1)[:, 0]

    def activations(
        self,
        params: Params,
        tokens_N: Tokens,
        sites: Collection[Site],
        *,
        patch: Patch | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> tuple[Array, dict[Site, Array]]:
        """Logits [N, V], and what each (layer, site) of `sites` held, after the patch: [N, D] for patch.SITES; for "attention" the
        probabilities [Q, N, N] float32, whose row n says how token n divided its attention. Raises ConfigError for another site.
        """
        tokens_N = jnp.asarray(tokens_N, jnp.int32)
        decoder, positions_N = Decoder(Given(params, self.mesh), self.config), jnp.arange(len(tokens_N))
        kept: Any = [{site: None for at, site in sites if at == layer} or None for layer in range(len(self.config.layers))]
        for layer, site in sites:
            if not 0 <= layer < len(kept) or site not in (*SITES, ATTENTION):
                raise ConfigError(f"there is no {site!r} in layer {layer}: {len(kept)} layers have {', '.join((*SITES, ATTENTION))}")
        with _precision(params):
            hidden_ND, kept = decoder(tokens_N, positions_N, kept, DenseContext(self._patching(patch, data, positions_N)))
            logits_NV = decoder.logits(hidden_ND)
        return logits_NV, {(layer, site): kept[layer][site] for layer, site in sites}

    def head(self, params: Params, hidden_ND: Array) -> Array:
        """Logits [N, V] float32 of any residual stream, through the final norm: the logit lens."""
        decoder = Decoder(Given(params, self.mesh), self.config)
        with _precision(params):
            return decoder.logits(decoder.norm(hidden_ND))

    def _patching(self, patch: Patch | None, data: Mapping[str, Any] | None, positions_N: Array) -> Patching | None:
        if patch is None:
            if data:
                raise ConfigError(f"data named {', '.join(data)} came without the patch that it is for")
            return None
        patch.check(len(self.config.layers))
        row = {name: jnp.asarray(value, patch.data[name].dtype)[None] for name, value in patch.complete(data).items()}
        return Patching(row, jnp.zeros_like(positions_N), positions_N, patch)

    def save(self, params: Params, folder: str | Path) -> None:
        """A folder that `load`, `LLM` and `jaxllm serve` take, with `params` in it, in the type they have (Orbax)."""
        from converters.orbax import write

        write(Path(folder), self.checkpoint, params)


def load(
    path: str | Path | None = None, *, dtype: str = "auto", devices: Sequence[Any] | None = None, max_model_len: int | None = None
) -> tuple[Model, dict[str, Array]]:
    """A model and its parameters: every tensor by our name, as Hugging Face stores it, in `dtype`.

    path: a folder or a Hub id; None is the model that ships in the package. The parameters are sharded over `devices`, by
    default the first one. A longrope model gets the frequencies for `max_model_len` tokens, by default the longest context it was
    made for, as in the engine. Raises ConfigError if checkpoint, options and devices do not fit together.
    """
    set_flags()  # for an engine that may follow in this process
    config = EngineConfig(model=None if path is None else str(path), dtype=dtype)
    with as_config_error():
        folder, checkpoint = open_model(config)
        network = checkpoint.config.for_context(max_model_len or checkpoint.config.max_position)
        model = Model(network, load_tokenizer(config, folder), make_mesh(devices or jax.devices()[:1]), checkpoint)
        return model, load_params(checkpoint, network, model.mesh, choose_dtype(dtype, checkpoint.dtype))


def _precision(params: Params) -> contextlib.AbstractContextManager:
    """As the engine multiplies: float32 in full, on a GPU too."""
    return jax.default_matmul_precision("highest" if params["embed.weight"].dtype == jnp.float32 else "default")
