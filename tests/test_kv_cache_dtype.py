"""A cache of fp8 pages holds twice as many tokens, and costs a little accuracy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import answer, core
from tiny import GOLDENS, QUICK, decoder

from converters.checkpoint import open_checkpoint
from jaxllm.config import EngineConfig
from jaxllm.decoder import DenseContext
from jaxllm.plan import GIB, Machine, make_plan
from jaxllm.request import ConfigError, Request, SamplingParams

FP8 = "float8_e4m3fn"
PROMPT = (5, 6, 7, 8, 9, 10, 30, 31, 32, 33, 34, 11)


@partial(jax.tree_util.register_dataclass, data_fields=["patching"], meta_fields=[])
class RoundingContext(DenseContext):
    """No cache, but keys and values as one would hold them in fp8."""

    def attend(self, q_NQH, k_NKH, v_NKH, kv, **options):
        k_NKH, v_NKH = (x.astype(FP8).astype(x.dtype) for x in (k_NKH, v_NKH))
        return super().attend(q_NQH, k_NKH, v_NKH, kv, **options)


def logprobs(context: DenseContext, tokens: list[int]) -> np.ndarray:
    """The log-probability of each token but the first, without a cache."""
    model = decoder("qwen3")

    @partial(jax.jit, compiler_options=QUICK)
    def table(ids):
        hidden_ND, _ = model(ids, jnp.arange(len(tokens)), None, context)
        return jax.nn.log_softmax(model.logits(hidden_ND))

    return np.asarray(table(jnp.asarray(tokens)))[np.arange(len(tokens) - 1), tokens[1:]]


def test_an_engine_with_an_fp8_cache_reads_rounded_keys_and_values():
    """It agrees with a network that rounds them and caches nothing, and is near the one that does not."""
    request = Request("r", PROMPT, SamplingParams(temperature=0, max_tokens=12, logprobs=1, prompt_logprobs=1, ignore_eos=True))
    (gather,) = answer(core("qwen3", kv_dtype=FP8), request)
    tokens = [*PROMPT, *gather.tokens()]
    prompt = next(o.prompt_logprobs for o in gather.outputs if o.prompt_logprobs is not None)
    assert prompt is not None
    found = np.array([tops[0].logprob for tops in [*prompt[1:], *gather.logprobs()] if tops])
    np.testing.assert_allclose(found, logprobs(RoundingContext(), tokens), atol=1e-3)
    apart = np.abs(found - logprobs(DenseContext(), tokens)).max()
    assert 0.002 < apart < 0.1, "the cache was in float, or the rounding is far too coarse"


def plan(memory: int | None = None, **options):
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=64, **options)
    model = open_checkpoint(GOLDENS / "qwen3").config
    return make_plan(config, model, "bfloat16", Machine("gpu", "a GPU", 1, memory), weight_bytes=0)


def test_fp8_pages_are_twice_as_many():
    plain, half = plan(2 * GIB), plan(2 * GIB, kv_cache_dtype="fp8")
    assert (plain.page_dtype, half.page_dtype) == ("bfloat16", FP8)
    assert abs(half.num_pages - 2 * plain.num_pages) <= 2
    assert f"in {FP8}" in str(half)


def test_another_dtype_is_refused():
    with pytest.raises(ConfigError, match="--kv-cache-dtype 'int8' is not supported; choose one of auto, fp8"):
        plan(2 * GIB, kv_cache_dtype="int8")
