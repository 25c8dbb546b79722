"""Steps with a kernel replaced: the same file gives the same tokens, a wrong one others, and afterwards all is as it was."""

import argparse
from pathlib import Path

import numpy as np
import pytest
from tiny import GOLDENS

import pallas_kernels
from bench import offline, variants, workloads
from jaxllm import LLM, batch, programs, step
from jaxllm.plan import Bucket
from pallas_kernels import attention, attention_reference

pytestmark = pytest.mark.usefixtures("compiled_quickly")

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
    monkeypatch.setattr(workloads, "mix_lengths", lambda: (np.array([9, 40]), np.array([5, 3])))


def test_a_copy_gives_the_same_tokens(bench, tmp_path):
    (copy := tmp_path / "copy.py").write_text(KERNEL.read_text())
    before = bench.llm.engine._runner._steps
    one, mix = variants.compared(bench, {"pallas_kernels.attention_reference": copy}, [1], mix=True, rounds=2)
    assert (one.what, one.same, one.tokens) == ("1 rows, ms a step", variants.ANSWER, variants.ANSWER)
    assert (mix.what, mix.same, mix.tokens) == ("MIX, s", 64 * variants.ANSWER, 64 * variants.ANSWER)
    assert all(len(each) == 2 for each in (one.as_it_is, one.replaced, mix.as_it_is, mix.replaced))
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


@pytest.mark.parametrize("path", ["pallas_kernels/nothing.py", "pallas_kernels/__init__.py", "pallas_kernels/tuning", "jaxllm/step.py"])
def test_what_is_no_kernel_is_refused(path):
    with pytest.raises(argparse.ArgumentTypeError, match=rf"'{path}' is no module of pallas_kernels; say PATH=OTHER"):
        variants._file(f"{path}={__file__}")


def test_another_file_that_is_not_there_is_refused_and_so_is_nothing_to_time(capsys):
    with pytest.raises(argparse.ArgumentTypeError, match=r"'nowhere.py', which is to stand for pallas_kernels/work.py, is no file"):
        variants._file("pallas_kernels/work.py=nowhere.py")
    with pytest.raises(SystemExit):
        variants.main(["--model", "nowhere", "--file", f"pallas_kernels/work.py={__file__}", "--batch"])
    assert "nothing to time: give --batch some rows, or --mix" in capsys.readouterr().err
