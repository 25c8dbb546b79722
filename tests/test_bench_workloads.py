"""The benches' arithmetic against figures worked out on paper for one H200, and the workloads against their published sums."""

import numpy as np
import pytest

from bench import workloads
from bench.workloads import MACHINES, SHAPES, Shape

H200 = MACHINES["NVIDIA H200"]


def shape(name: str) -> Shape:
    found = Shape.of(SHAPES[name])
    assert found is not None
    return found


def test_mix_is_the_published_one():
    prompts, outputs = workloads.mix_lengths()
    assert len(prompts) == len(outputs) == 1000
    assert (prompts.sum(), outputs.sum()) == (298_901, 209_177)
    assert prompts.min() >= 4 and prompts.max() <= 2048 and outputs.min() >= 4 and outputs.max() <= 1024


@pytest.mark.parametrize(
    ("model", "batch", "ms"),
    [
        ("llama-3.1-8b", 1, 3.46),
        ("llama-3.1-8b", 8, 3.60),
        ("llama-3.1-8b", 32, 4.07),
        ("llama-3.1-8b", 64, 4.68),
        ("llama-3.1-8b", 128, 5.91),
        ("llama-3.1-8b", 256, 8.37),
        ("qwen2.5-3b", 1, 1.42),
        ("qwen2.5-3b", 64, 1.76),
        ("qwen2.5-3b", 256, 2.80),
        ("qwen2.5-0.5b", 1, 0.228),
        ("qwen2.5-0.5b", 8, 0.24),
        ("qwen2.5-0.5b", 64, 0.34),
        ("qwen2.5-0.5b", 256, 0.69),
    ],
)
def test_decode_limit(model, batch, ms):
    digits = len(str(ms).split(".")[1])
    assert 1e3 * workloads.decode_limit(shape(model), H200, batch) == pytest.approx(ms, rel=4e-3, abs=0.6 * 10**-digits)


@pytest.mark.parametrize(("prompt", "tok_s"), [(2048, 54_500), (8192, 49_000)])
def test_prefill_limit(prompt, tok_s):
    assert workloads.prefill_limit(shape("llama-3.1-8b"), H200, prompt) == pytest.approx(tok_s, rel=2e-3)


@pytest.mark.parametrize(("model", "seconds"), [("llama-3.1-8b", 14.2), ("qwen2.5-3b", 5.4), ("qwen2.5-0.5b", 0.95)])
def test_mix_limit(model, seconds):
    assert workloads.mix_limit(shape(model), H200) == pytest.approx(seconds, rel=1e-2)


def test_two_devices_halve_the_bytes_until_kv_heads_run_out():
    qwen = shape("qwen2.5-0.5b")  # two KV heads
    assert workloads.decode_limit(qwen, H200, 64, tp=2) == pytest.approx(workloads.decode_limit(qwen, H200, 64) / 2)
    assert workloads.decode_limit(qwen, H200, 64, tp=4) > workloads.decode_limit(qwen, H200, 64) / 4


def test_sizes_are_those_of_the_models():
    """Parameter counts that the models' authors state: 8.03, 70.6, 3.09 and 0.49 billion, embeddings included."""
    stated = {"llama-3.1-8b": 8.03e9, "llama-3-70b": 70.6e9, "qwen2.5-3b": 3.09e9, "qwen2.5-0.5b": 0.494e9}
    for name, count in stated.items():
        sizes, config = shape(name), SHAPES[name]
        assert sizes.linear + sizes.head * (1 if config["tie_word_embeddings"] else 2) == pytest.approx(count, rel=3e-3), name


def test_limits_and_anchors_are_given_only_where_they_hold():
    row = {"name": "decode_step_ms", "model": "llama-3.1-8b", "batch": 64, "tp": 1, "dtype": "bfloat16"}
    sizes = shape("llama-3.1-8b")
    assert workloads.vllm_figure("NVIDIA H200", row) == 6.79
    assert workloads.limit("NVIDIA H200", sizes, row) == pytest.approx(4.68, abs=0.01)
    assert workloads.vllm_figure("cpu", row) is None and workloads.limit("cpu", sizes, row) is None
    assert workloads.vllm_figure("NVIDIA H200", row | {"tp": 2}) is None
    assert workloads.vllm_figure("NVIDIA H200", row | {"batch": 48}) is None
    assert workloads.vllm_figure("NVIDIA H200", row | {"dtype": "float32"}) is None
    assert workloads.limit("NVIDIA H200", None, row) is None
    assert workloads.vllm_figure("NVIDIA H200", row | {"name": "mix_s", "batch": 1000}) == 20.1
    assert workloads.vllm_figure("NVIDIA H200", row | {"name": "mix_sampled_s", "batch": 1000}) == 24.0
    assert Shape.of({"model_type": "mixtral"}) is None


def test_random_prompts_share_no_prefix():
    prompts = workloads.random_prompts(np.random.default_rng(0), [512] * 64, 151936)
    assert [len(p) for p in prompts] == [512] * 64
    assert len({tuple(p[:4]) for p in prompts}) == 64
    assert all(0 <= token < 151936 for p in prompts for token in p)
