"""A prompt of several chunks and the answer behind it, beside one dense sequence in float32: a long context's shorter twin."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import on_gpu
from flax import nnx

from bench.workloads import SHAPES
from converters.checkpoint import read_config, tensor_shapes
from jaxllm import LLM, SamplingParams
from jaxllm.decoder import Decoder, DenseContext
from jaxllm.parallel import make_mesh
from jaxllm.weights import RandomWeights

SMALL = dict(vocab_size=512, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=256)
SIZES = {"vocab_size": 4096} if on_gpu() else SMALL  # on a GPU all else is as the 8B has it
LAYERS, PROMPT, ANSWER = (4, 5000, 64) if on_gpu() else (2, 300, 16)


@pytest.mark.gpu
@pytest.mark.parametrize(("chunks", "devices"), [(10, 1), (3, 1), (3, 2), (3, 4)])
def test_a_long_prompt_is_answered_as_one_dense_sequence_would_be(chunks, devices, tmp_path):
    """Each token's log-probability to what bfloat16 rounds, and the likeliest token wherever it leads by more than that."""
    if (not on_gpu() and (chunks, devices) != (10, 1)) or devices > len(jax.devices()):
        pytest.skip(f"on a GPU only, of which there are {len(jax.devices())}" if on_gpu() else "on a GPU only")
    config = SHAPES["llama-3.1-8b"] | {"num_hidden_layers": LAYERS} | SIZES
    (tmp_path / "config.json").write_text(json.dumps(config))
    llm = LLM(
        model=str(tmp_path), load_format="dummy", dtype="bfloat16", max_model_len=PROMPT + 2 * ANSWER, max_num_seqs=4,
        max_num_batched_tokens=-(-PROMPT // chunks), enforce_eager=True, num_gpu_blocks_override=200, gpu_memory_utilization=0.3,
        tensor_parallel_size=devices,
    )  # fmt: skip
    prompt = np.random.default_rng(0).integers(0, config["vocab_size"], PROMPT).tolist()
    [answer] = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=ANSWER, logprobs=1, ignore_eos=True), use_tqdm=False)
    found, said = list(answer.outputs[0].token_ids), answer.outputs[0].logprobs
    assert said is not None and len(found) == ANSWER

    model = read_config(config)
    decoder = Decoder(RandomWeights(tensor_shapes(model), make_mesh(jax.devices()[:1]), "bfloat16", 0), model)
    graph, state = nnx.split(decoder)

    @jax.jit
    def dense(state, tokens_N):
        decoder = nnx.merge(graph, jax.tree.map(lambda a: a.astype(jnp.float32), state))
        hidden_ND, _ = decoder(tokens_N, jnp.arange(len(tokens_N)), None, DenseContext())
        return jax.nn.log_softmax(decoder.logits(hidden_ND[PROMPT - 1 :]))

    with jax.default_matmul_precision("highest"):
        meant = np.asarray(dense(state, jnp.array([*prompt, *found[:-1]])))
    error = max(abs(each[0].logprob - meant[i, token]) for i, (token, each) in enumerate(zip(found, said, strict=True)))
    assert error < 0.1
    first, second = np.sort(meant, axis=1)[:, -1], np.sort(meant, axis=1)[:, -2]
    sure = first - second > 2 * error
    assert sure.mean() > 0.5, "or the answers say little"
    np.testing.assert_array_equal(np.array(found)[sure], meant.argmax(axis=1)[sure])
