"""What must not be drawn is not drawn, row by row, and embeddings are the network's own hidden states."""

import jax.numpy as jnp
import numpy as np
import pytest
from engines import LONGEST, Gather, answer, core, counted_compilations, dense_logits, finish, naive
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import decoder

from jaxllm import sample
from jaxllm.decoder import DenseContext
from jaxllm.mask import TokenMask, pack, spellings, words
from jaxllm.request import Request, RequestError, SamplingParams
from jaxllm.vectors import cosine, shortened, unit

VOCAB = 64
PROMPT = (10, 11, 12, 13)


def bits(packed: np.ndarray, vocab: int = VOCAB) -> set[int]:
    return {i for i in range(vocab) if packed[i // 32] >> (i % 32) & 1}


@settings(max_examples=25, deadline=None)
@given(ids=st.sets(st.integers(0, 99)))
def test_packing_and_the_device_agree(ids):
    packed = pack(ids, 100)
    assert packed.shape == (words(100),) == (4,) and bits(packed, 100) == ids
    masked = np.asarray(sample.mask(jnp.zeros((2, 100)), jnp.stack([packed, np.zeros(4, np.int32)])))
    assert set(np.flatnonzero(masked[0] == -np.inf)) == ids and not masked[1].any()


def test_what_a_mask_bans():
    mask = TokenMask(range(8), [(3,), (4, 5), (1, 2, 6), (1, 2, 7)], VOCAB)
    always = {3, *range(8, VOCAB)}
    assert mask.changes and not TokenMask(None, [(3,)], VOCAB).changes
    for produced, more in (([], ()), ([4], (5,)), ([2], ()), ([1, 2], (6, 7)), ([0, 1, 2], (6, 7)), ([1, 2, 0], ())):
        assert bits(mask.banned(produced)) == always | set(more)


def test_a_mask_always_leaves_a_token():
    with pytest.raises(RequestError, match="leave no token"):
        TokenMask([3], [(3,)], VOCAB)
    assert 5 not in bits(TokenMask([5], [(5, 5)], VOCAB).banned([5]))


def test_a_word_is_spelled_at_the_beginning_and_after_a_space():
    class Letters:
        def encode(self, text, add_special_tokens):
            return [ord(c) for c in text if not (c == " " and len(text) == 2)]

    assert spellings(" ab", Letters()) == [(97, 98), (32, 97, 98)]  # pyright: ignore[reportArgumentType]
    assert spellings("a", Letters()) == [(97,)]  # pyright: ignore[reportArgumentType]


def masked_naive(count: int, mask: TokenMask) -> list[int]:
    """One request by itself: the likeliest token that is not banned."""
    tokens: list[int] = list(PROMPT)
    for _ in range(count):
        logits = dense_logits("qwen3", tokens)[-1].copy()
        logits[list(bits(mask.banned(tokens[len(PROMPT) :]), len(logits)))] = -np.inf
        tokens.append(int(logits.argmax()))
    return tokens[len(PROMPT) :]


def test_masked_rows_beside_free_ones_and_in_the_slots_they_left():
    """A fixed mask, one that changes with every token, and none, in one batch; then free rows again in the same slots."""
    free = naive("qwen3", PROMPT, 10)
    vocab = 64
    allowed = tuple(range(4, vocab, 3))
    phrases = [(free[0], free[1]), (free[4],)]
    changing = TokenMask(None, phrases, vocab)
    engine = core("qwen3")

    def request(name: str, **params) -> Request:
        return Request(name, PROMPT, SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, **params))

    gathers = [Gather() for _ in range(4)]
    engine.add(request("free"), gathers[0])
    engine.add(request("allowed", allowed_token_ids=allowed), gathers[1])
    engine.add(request("changing", logprobs=0), gathers[2])  # logprobs: so that the row's draw is the one that edits
    engine._live["changing"].answers[0].sequence.mask = changing
    engine.add(request("free too", logprobs=0), gathers[3])
    finish(engine)
    assert gathers[0].tokens() == gathers[3].tokens() == free
    assert gathers[1].tokens() == masked_naive(10, TokenMask(allowed, [], vocab)) and set(gathers[1].tokens()) <= set(allowed)
    assert gathers[2].tokens() == masked_naive(10, changing) != free
    again = answer(engine, *(request(f"again {i}", logprobs=0) for i in range(4)))
    assert all(gather.tokens() == free for gather in again)


def test_steps_in_which_rows_are_masked_and_no_more():
    """Their draw is another executable, without penalties and log-probabilities. A mask that changes has every token of the row's own."""
    vocab, count = 64, 10
    free = naive("qwen3", PROMPT, count)
    fixed, changing = TokenMask(range(0, vocab, 3), [], vocab), TokenMask(None, [(free[0], free[1]), (free[4],)], vocab)
    engine = core("qwen3")
    gathers = {name: Gather() for name in ("free", "fixed", "changing")}
    for name, gather in gathers.items():
        allowed = {"free": None, "fixed": range(0, vocab, 3), "changing": range(vocab)}[name]
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, allowed_token_ids=allowed and tuple(allowed))
        assert not params.edits
        engine.add(Request(name, PROMPT, params), gather)
    engine._live["changing"].answers[0].sequence.mask = changing
    finish(engine)
    assert {name: gather.tokens() for name, gather in gathers.items()} == {
        "free": free,
        "fixed": masked_naive(count, fixed),
        "changing": masked_naive(count, changing),
    }


def test_a_row_that_waits_for_its_mask_has_a_token_while_free_ones_have_several(monkeypatch):
    """Whoever draws less often than others in a dispatch, its last turn included, has the tokens that it has by itself."""
    free, vocab = naive("qwen3", PROMPT, 22), 64
    changing = TokenMask(None, [(free[0], free[1]), (free[4],)], vocab)
    prompts = {"free": PROMPT, "waits": PROMPT, "sampled": (7, 8, 9), "short": (20, 21)}
    hot = dict(temperature=0.9, top_p=0.9, seed=5)
    held = dict(max_tokens=8, allowed_token_ids=range(vocab))
    wants = {"free": dict(max_tokens=22), "waits": held, "sampled": dict(max_tokens=22, **hot), "short": dict(max_tokens=6)}

    def request(name: str) -> Request:
        return Request(name, prompts[name], SamplingParams(**{"temperature": 0, "ignore_eos": True, **wants[name]}))

    alone = {name: answer(core("qwen3"), request(name))[0].tokens() for name in ("sampled", "short")}
    engine, gathers, turns = core("qwen3", decode_steps=3), {name: Gather() for name in wants}, []
    schedule = engine._scheduler.next

    def noted():
        if (step := schedule()) is not None:
            turns.append(sorted(row.samples for row in step.rows))
        return step

    monkeypatch.setattr(engine._scheduler, "next", noted)
    for name, gather in gathers.items():
        engine.add(request(name), gather)
    engine._live["waits"].answers[0].sequence.mask = changing
    with counted_compilations() as compilations:
        finish(engine)
    assert not compilations
    assert {name: gather.tokens() for name, gather in gathers.items()} == {
        "free": free,
        "waits": masked_naive(8, changing),
        **alone,
    }
    assert turns == [[1] * 4, [1, 3, 3, 3], [1, 2, 3, 3], *[[1, 3, 3]] * 5]


def embedding(gather: Gather) -> tuple[float, ...]:
    found = gather.outputs[-1].embedding
    assert found is not None
    return found


def test_an_embedding_is_the_last_hidden_state_whatever_the_batch():
    model = decoder("qwen3")
    prompts = [PROMPT, tuple(range(20, 43)), (7,)]
    params = SamplingParams(temperature=0, max_tokens=1)
    requests = [Request(f"e{i}", prompt, params, embed=True) for i, prompt in enumerate(prompts)]
    chat = Request("text", PROMPT, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    *gathers, text = answer(core("qwen3"), *requests, chat)
    for prompt, gather in zip(prompts, gathers, strict=True):
        hidden, _ = model(jnp.array(prompt), jnp.arange(len(prompt)), None, DenseContext())
        expected = np.asarray(hidden[-1], np.float64)
        np.testing.assert_allclose(embedding(gather), expected / np.linalg.norm(expected), atol=1e-5)
    assert text.tokens() == naive("qwen3", PROMPT, 6) and text.outputs[-1].embedding is None


def test_vectors():
    assert unit([3, 4]) == (0.6, 0.8) and unit([0, 0]) == (0, 0)
    assert shortened((0.6, 0.0, 0.8), 2) == (1.0, 0.0) and cosine((0.6, 0.8), (1.0, 0.0)) == 0.6
    with pytest.raises(RequestError, match="dimensions is 4, but this model's vectors have 3"):
        shortened((1, 0, 0), 4)


def test_the_longest_prompt_can_be_embedded():
    (gather,) = answer(core("qwen3"), Request("e", (5,) * (LONGEST - 1), SamplingParams(max_tokens=1), embed=True))
    assert len(embedding(gather)) == decoder("qwen3").c.d_model
