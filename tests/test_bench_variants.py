"""Steps with a kernel replaced: the same file gives the same tokens, a wrong one others, and afterwards all is as it was."""

import argparse
from pathlib import Path

import pytest
from tiny import GOLDENS

import pallas_kernels
from bench import offline, variants, workloads
from jaxllm import LLM, batch, programs, step
from jaxllm.plan import Bucket
from pallas_kernels import attention, attention_reference

KERNEL = Path(pallas_kernels.__file__).parent / "attention_reference.py"


@pytest.fixture(scope="module")
def bench():
    with LLM(
        model=str(GOLDENS / "qwen2"), load_format="dummy", dtype="float32", max_num_seqs=4, max_model_len=64, enforce_eager=True
    ) as llm:
        yield offline.Bench(llm, config={"vocab_size": llm.engine.vocab_size}, device="cpu", model="tiny", dtype="float32", tp=1, repeats=1)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    for name, value in {"DECODE_PROMPT": 8, "DECODE_STEPS": 4}.items():
        monkeypatch.setattr(workloads, name, value)


def test_a_copy_gives_the_same_tokens(bench, tmp_path):
    (copy := tmp_path / "copy.py").write_text(KERNEL.read_text())
    before = bench.llm.engine._runner._steps
    one, four = variants.compared(bench, {"pallas_kernels.attention_reference": copy}, [1, 4], mix=False, rounds=2)
    assert (one.what, one.tokens, four.tokens) == ("1 rows, ms a step", variants.ANSWER, 4 * variants.ANSWER)
    assert (one.same, four.same) == (one.tokens, four.tokens) and len(one.as_it_is) == len(one.replaced) == 2
    assert bench.llm.engine._runner._steps is before and attention.attention_reference is attention_reference


def test_another_kernel_gives_others(bench, tmp_path):
    twice = "\n\nright = attend\n\n\ndef attend(*args, **options):\n    o, lse = right(*args, **options)\n    return 2 * o, lse\n"
    (wrong := tmp_path / "wrong.py").write_text(KERNEL.read_text() + twice)
    [found] = variants.compared(bench, {"pallas_kernels.attention_reference": wrong}, [4], mix=False, rounds=1)
    assert found.same < found.tokens


def test_modules_and_what_is_imported_by_name_are_replaced_while_it_lasts(tmp_path):
    (other := tmp_path / "batch.py").write_text("def packed_size(bucket):\n    return 7\n")
    (also := tmp_path / "step.py").write_text("from jaxllm.batch import packed_size\n")
    right = batch.packed_size
    with variants.in_place({"jaxllm.batch": other, "jaxllm.step": also}):
        assert programs.packed_size(Bucket(0, 1)) == vars(programs.device)["packed_size"](Bucket(0, 1)) == 7
    assert (programs.packed_size, programs.device) == (right, step)


def test_its_report_says_how_much_faster():
    text = str(variants.Compared("64 rows, ms a step", [5.0, 5.2, 5.1], [4.9, 4.8, 4.85], 64, 64))
    assert text == "64 rows, ms a step: 5 5.2 5.1, replaced 4.9 4.8 4.85: -4.9%; 64 of 64 tokens are the same"


@pytest.mark.parametrize("given", ["pallas_kernels/nothing.py=a.py", "jaxllm/step.py=pyproject.toml", "pallas_kernels/work.py=nowhere.py"])
def test_files_that_are_not_there_are_refused(given):
    with pytest.raises(argparse.ArgumentTypeError, match=r"is no file"):
        variants._file(given)
