"""Every example of docs/research.md runs, on the default model, and does what its page says."""

import re
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("compiled_quickly")

ROOT = Path(__file__).parent.parent


def main(name: str):
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"]


def test_every_example_of_the_page_is_run_here():
    named = set(re.findall(r"examples/(\w+)\.py", (ROOT / "docs" / "research.md").read_text()))
    run = set(re.findall(r'main\("(\w+)"\)', Path(__file__).read_text()))
    assert named == run


def test_pure_function():
    made = main("pure_function")()
    logits, tokens, forward = np.asarray(made["logits"], np.float64), made["tokens"], jax.jit(made["model"].forward)
    table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(made["logprobs"], table[np.arange(len(tokens) - 1), tokens[1:]], atol=1e-4)
    for prompt, logits_NV in zip(made["prompts"], made["batch"], strict=True):
        padded = np.zeros(len(logits_NV), np.int32)
        padded[: len(prompt)] = prompt
        np.testing.assert_allclose(logits_NV, forward(made["params"], padded), atol=1e-3)
    assert made["gradient"].keys() == made["params"].keys()
    np.testing.assert_allclose(made["looks"].sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(made["model"].head(made["params"], made["last"]), made["logits"], atol=1e-3)


def test_steering():
    made = main("steering")(tokens=12)
    as_it_is, happier, sadder, again = (output.outputs[0] for output in made["together"])
    assert as_it_is == again == made["alone"].outputs[0]
    assert len({each.token_ids for each in (as_it_is, happier, sadder)}) > 1
    assert [lp[0].logprob for lp in happier.logprobs] != [lp[0].logprob for lp in sadder.logprobs]
    np.testing.assert_allclose([lp[0].logprob for lp in happier.logprobs], made["exact"], atol=1e-3)


def test_a_policy_gradient_raises_the_reward():
    rewards = main("reinforce")(rounds=5, rows=16, tokens=16)
    assert rewards[-1] > 1.2 * rewards[0], rewards


def test_fine_tuning_lowers_the_loss_and_what_was_saved_is_served(tmp_path):
    made = main("fine_tune")(str(tmp_path / "tuned"), steps=20, rows=4, length=32)
    assert np.mean(made["losses"][-5:]) < 0.7 * made["losses"][0]
    assert made["text"]
