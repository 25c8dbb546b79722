"""From what was asked to what will be done: numbers by hand, and refusals that say both."""

import dataclasses
import math
import re

import pytest

from bench.workloads import SHAPES
from converters.checkpoint import read_config, tensor_shapes
from jaxllm.config import EngineConfig
from jaxllm.plan import GIB, SLACK, Bucket, Machine, kv_page_bytes, make_plan
from jaxllm.request import MAX_BIAS, MAX_STOP_IDS, ConfigError

LLAMA = read_config(SHAPES["llama-3.1-8b"])
WEIGHTS = 2 * sum(math.prod(shape) for shape in tensor_shapes(LLAMA).values())
H200 = Machine("gpu", "NVIDIA H200", 1, int(0.9 * 140.4 * GIB))
SMALL_GPU = Machine("gpu", "NVIDIA L4", 1, int(0.9 * 22.5 * GIB))
CPU = Machine("cpu", "cpu", 1)


def plan(machine=H200, weights=WEIGHTS, **options):
    return make_plan(EngineConfig(**options), LLAMA, "bfloat16", machine, weights)


def test_a_page_of_llama_8b_takes_what_arithmetic_says():
    assert kv_page_bytes(LLAMA, 64, "bfloat16", 1) == 2 * 32 * 8 * 64 * 128 * 2 == 8 * 2**20
    assert kv_page_bytes(LLAMA, 64, "bfloat16", 4) == 2 * 2**20
    assert kv_page_bytes(LLAMA, 64, "float32", 1) == 16 * 2**20
    assert kv_page_bytes(LLAMA, 64, "float8_e4m3fn", 1) == 4 * 2**20


def test_memory_is_divided_and_nothing_is_promised_twice():
    made = plan()
    assert made.step_bytes is not None
    ports = 4 * (LLAMA.vocab_size + LLAMA.d_model) * sum({b.rows for b in (*made.buckets, made.scored)})
    state = 1025 * (3 * LLAMA.vocab_size + LLAMA.vocab_size // 8 + 4 * (made.max_pages + 2 * MAX_BIAS + MAX_STOP_IDS + 16))
    pages = (made.num_pages + 1) * kv_page_bytes(LLAMA, 64, "bfloat16", 1)
    taken = WEIGHTS + made.step_bytes + ports + state + pages + SLACK
    assert H200.memory is not None and H200.memory - 8 * 2**20 <= taken <= H200.memory
    assert made.max_model_len == 131_072 and made.max_num_seqs == 1024


def test_the_smallest_step_has_room_for_cublas():
    """Its workspace, 32 MiB on Hopper, is among XLA's temporaries, and a start is refused that they do not fit."""
    tiny = dataclasses.replace(LLAMA, vocab_size=512, d_model=64, d_ff=172, num_heads=8, num_kv_heads=4, head_dim=8)
    made = make_plan(EngineConfig(max_num_seqs=1, max_num_batched_tokens=32), tiny, "float32", H200, 2**20)
    assert made.step_bytes is not None and made.step_bytes > 32 * 2**20


def test_the_line_people_know():
    assert re.search(
        r"^bfloat16, \d+ pages of 64 tokens in bfloat16: maximum concurrency for 131,072 tokens per request: \d\.\d\dx", str(plan())
    )


def test_twenty_shapes_at_most_and_each_step_finds_one():
    for machine in (H200, SMALL_GPU, CPU):
        made = plan(machine, max_model_len=8192)
        assert len(made.buckets) + 1 <= 20
        for rows in {1, 2, 9, 100, 255, made.max_num_seqs}:
            for chunk in {0, 1, 300, made.largest.chunk}:
                bucket = made.bucket(min(rows, made.max_num_seqs), chunk)
                assert bucket.rows >= min(rows, made.max_num_seqs) and bucket.chunk >= chunk
        assert made.largest.rows == made.max_num_seqs


def test_shapes_that_differ_in_padding_are_one_where_padding_is_left_out():
    """From 768 lanes on: a decode shape and one with prompt tokens. No other plan changes, nor what a step may hold."""
    made = plan(max_model_len=8192)
    fewer = made.without_padding(768)
    assert {(b.chunk, b.rows) for b in made.buckets} - {(b.chunk, b.rows) for b in fewer.buckets} == {
        *[(0, 768), (448, 1024), (2048, 64), (2048, 256), (2048, 1024), (8192, 64), (8192, 256)],
    }
    assert (fewer.largest, fewer.streamed_chunk, fewer.num_pages) == (made.largest, 2048, made.num_pages)
    assert fewer.bucket(70, 2048) == fewer.bucket(1024, 8192) == Bucket(8192, 1024)
    assert [fewer.bucket(rows, 448) for rows in (64, 256, 257)] == [Bucket(448, 64), Bucket(448, 256), Bucket(8192, 1024)]
    small = plan(max_model_len=8192, max_num_seqs=64, max_num_batched_tokens=256)
    assert small.without_padding(768) == small
    only = plan(max_model_len=8192, enforce_eager=True)
    assert only.without_padding(768) == only


def test_small_models_decode_several_tokens_a_dispatch():
    """As many as keep the device busy while the host makes the next one: their weights are read in less time than that takes."""
    qwen_05b, qwen_3b = 988_000_000, 6_170_000_000
    assert [make_plan(EngineConfig(), LLAMA, "bfloat16", H200, size).decode_steps for size in (qwen_05b, qwen_3b, WEIGHTS)] == [8, 1, 1]
    assert plan(CPU, max_model_len=8192).decode_steps == 1
    assert plan(num_scheduler_steps=5).decode_steps == 5
    assert make_plan(EngineConfig(block_size=4), LLAMA, "bfloat16", H200, qwen_05b).decode_steps == 4, "a page has no more tokens"
    with pytest.raises(ConfigError, match=r"--num-scheduler-steps must be from 1 to --block-size, which is 16, but it is 17"):
        plan(num_scheduler_steps=17, block_size=16)


def test_on_a_cpu_a_shape_of_one_row_is_for_float32():
    smallest = [min(plan(CPU, max_model_len=1024, dtype=dtype).buckets) for dtype in ("float32", "bfloat16", "float16")]
    assert smallest == [Bucket(0, 1), Bucket(0, 8), Bucket(0, 8)]


def test_gpus_that_reach_each_other_sum_by_mailboxes_unless_they_must_not():
    two, apart = (dataclasses.replace(H200, count=2, peers=peers) for peers in (True, False))
    assert plan(two, tensor_parallel_size=2).mailboxes and not plan(two, tensor_parallel_size=1).mailboxes
    assert not plan(apart, tensor_parallel_size=2).mailboxes
    assert not plan(two, tensor_parallel_size=2, disable_custom_all_reduce=True).mailboxes


def test_enforce_eager_compiles_two_shapes():
    assert plan(enforce_eager=True, max_num_seqs=16, max_num_batched_tokens=512).buckets == (Bucket(0, 16), Bucket(512, 16))


def test_lanes_of_a_gpu_s_rows_come_by_the_eight():
    """As its kernels for prompts take them; the rows that may run are as asked, and one that is always alone decodes alone."""
    for eager, rows, lanes in ((False, 100, 104), (True, 100, 104), (False, 3, 8), (False, 1, 8), (True, 1, 8)):
        made = plan(max_num_seqs=rows, enforce_eager=eager, max_model_len=8192)
        assert (made.max_num_seqs, made.largest) == (rows, Bucket(8192, lanes))
        assert made.bucket(rows, 0) == Bucket(0, 1 if rows == 1 else lanes)
        assert made.bucket(1, 1).rows == (lanes if eager else min(64, lanes))
        assert {b.rows % 8 for b in (*made.buckets, made.scored) if b.chunk} == {0}
        assert made.without_padding(768).largest == made.largest
    assert plan(CPU, max_num_seqs=3, max_model_len=512).largest.rows == 3


def test_auto_takes_what_memory_allows():
    made = plan(SMALL_GPU, max_model_len=-1, max_num_seqs=8, max_num_batched_tokens=512)
    assert made.max_model_len == made.num_pages * 64 < 131_072
    assert plan(max_model_len=-1).max_model_len == 131_072


def test_options_are_taken_at_their_word():
    made = plan(max_num_seqs=300, max_num_batched_tokens=3000, block_size=32, max_model_len=1000, num_gpu_blocks_override=77)
    assert (made.max_num_seqs, made.largest, made.page_size, made.max_pages, made.num_pages) == (300, Bucket(3000, 304), 32, 32, 77)


def test_on_a_cpu_the_cache_has_a_stated_size():
    made = plan(CPU, max_model_len=4096, dtype="float32")
    assert made.num_pages * kv_page_bytes(LLAMA, 64, "float32", 1) == GIB
    assert made.step_bytes is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 200_000}, "--max-model-len 200000 is more than the 131072 positions"),
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size 2 wants as many devices, but this machine shows 1"),
        ({"dtype": "int8"}, "dtype 'int8' is not supported; choose one of auto, half"),
        (
            {"num_gpu_blocks_override": 9},
            "one request of 131072 tokens needs 2048 pages of 64 tokens .16.00 GiB., .*there is room for 9; lower",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_both_numbers(options, message):
    with pytest.raises(ConfigError, match=message):
        plan(**options)


def test_weights_that_leave_no_room_are_refused():
    with pytest.raises(ConfigError, match=r"the weights take 40\.00 GiB and leave no room for a single page"):
        plan(SMALL_GPU, weights=40 * GIB, max_model_len=-1)


@pytest.mark.parametrize(("gib", "chunk"), [(1, 8192), (15, 2048), (35, 448), (90, 448)])
def test_prompts_beside_streamed_answers_keep_a_pace(gib, chunk):
    """60 ms of products: two bytes a parameter, two operations a parameter and token."""
    assert plan(weights=gib * GIB).streamed_chunk == chunk


def test_a_chunk_that_was_asked_for_is_taken():
    assert plan(max_num_batched_tokens=4096).streamed_chunk == 4096
