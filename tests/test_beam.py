"""Beam search finds what a search with the plain network finds."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from server_fixtures import STORIES

from jaxllm import LLM, BeamSearchParams, RequestError, load
from jaxllm.beam import search
from jaxllm.request import Completion, Logprob, Output

pytestmark = pytest.mark.usefixtures("compiled_quickly")

WIDTH = 4


@pytest.fixture(scope="module")
def llm():
    options: Any = dict(device="cpu", dtype="float32", max_num_seqs=8, max_model_len=64, max_logprobs=2 * WIDTH, enforce_eager=True)
    with LLM(STORIES, max_num_batched_tokens=32, **options) as llm:
        yield llm


@pytest.fixture(scope="module")
def table():
    """Log-probabilities [B, V] of the token after each of B sequences of one length."""
    model, params = load(STORIES, dtype="float32")
    last = jax.jit(jax.vmap(lambda tokens: jax.nn.log_softmax(model.forward(params, tokens)[-1])))
    return lambda sequences: np.asarray(last(jnp.array(sequences)), np.float64)


def beams(prompt, steps, table, penalty):
    """By the plain network, without an end token."""
    found = [(0.0, tuple(prompt))]
    for _ in range(steps):
        logprobs = table([tokens for _, tokens in found])
        longer = [(total + row[t], (*tokens, t)) for (total, tokens), row in zip(found, logprobs, strict=True) for t in range(len(row))]
        found = sorted(longer, key=lambda beam: -beam[0] / len(beam[1]) ** penalty)[:WIDTH]
    return found


@pytest.mark.parametrize("penalty", [1.0, 0.0])
def test_beams_are_those_of_the_plain_network(llm, table, penalty):
    prompts = ["Once upon a time", "Tom and Lily"]
    params = BeamSearchParams(WIDTH, 6, ignore_eos=True, length_penalty=penalty)
    for prompt, output in zip(prompts, llm.beam_search(prompts, params), strict=True):
        expected = beams(llm.tokenizer.encode(prompt), 6, table, penalty)
        assert [beam.tokens for beam in output.sequences] == [tokens for _, tokens in expected]
        np.testing.assert_allclose([beam.cum_logprob for beam in output.sequences], [total for total, _ in expected], atol=1e-3)
        for beam in output.sequences:
            assert beam.text == llm.tokenizer.decode(beam.tokens) and beam.finish_reason == "length"
            np.testing.assert_allclose(sum(entry[0].logprob for entry in beam.logprobs), beam.cum_logprob, atol=1e-4)


def test_the_best_pair_of_tokens_is_found_among_all(llm, table):
    prompt = tuple(llm.tokenizer.encode("Once upon a time, there was a"))
    first = table([prompt])[0]
    second = table([(*prompt, token) for token in range(len(first))])
    best = np.unravel_index((first[:, None] + second).argmax(), second.shape)
    (output,) = llm.beam_search([prompt], BeamSearchParams(WIDTH, 2, ignore_eos=True))
    assert output.sequences[0].tokens == (*prompt, *(int(token) for token in best))


def test_ends_lengths_and_scores():
    """A made-up model: 9 ends, and after it nothing is asked; token 1 is likely, 2 less so, the end in between."""
    asked = []

    def ask(many, params):
        asked.append(many)
        entries = [Logprob(1, -1.0, 1), Logprob(9, -1.5, 2), Logprob(2, -2.0, 3), Logprob(3, -9.0, 4)][: params.logprobs]
        return [Output("x", None, tokens, (Completion(0, "", (1,), ((entries[0], *entries),)),), True) for tokens in many]

    (found,) = search([(5, 5)], BeamSearchParams(2, 3, length_penalty=0.0), ask, frozenset({9}), 100)
    assert [(beam.tokens, beam.cum_logprob, beam.finish_reason) for beam in found] == [
        ((5, 5, 9), -1.5, "stop"),
        ((5, 5, 1, 9), -2.5, "stop"),
    ]
    assert not any(9 in tokens for tokens in itertools.chain(*asked))
    (found,) = search([(5, 5)], BeamSearchParams(2, 3, length_penalty=0.0, ignore_eos=True), ask, frozenset({9}), 4)
    assert [beam.tokens for beam in found] == [(5, 5, 1, 1), (5, 5, 1, 9)], "no longer than fits"
    # By length, prompt included and end not: -1.5 / 2, -2.5 / 3, and the best open one -3 / 5.
    (found,) = search([(5, 5)], BeamSearchParams(2, 3, length_penalty=1.0), ask, frozenset({9}), 100)
    assert [beam.tokens for beam in found] == [(5, 5, 1, 1, 1), (5, 5, 9)]


@pytest.mark.parametrize(("given", "says"), [((0, 5), "beam_width"), ((2, 0), "max_tokens"), ((2, 5, False, 0.7), "temperature")])
def test_wrong_parameters(given, says):
    with pytest.raises(RequestError, match=says):
        BeamSearchParams(*given)


def test_a_width_that_the_engine_cannot_serve(llm):
    with pytest.raises(RequestError, match="beam_width 5 needs 10 log-probabilities a token, but this engine gives at most 8"):
        llm.beam_search("a", BeamSearchParams(5, 2))
