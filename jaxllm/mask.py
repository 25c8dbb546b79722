"""Which tokens a row must not draw next, as packed bits: what allowed_token_ids and bad_words of a request come to.

A row's bits live on the device and are sent there when the row is admitted. Where they depend on the tokens so far (`changes`), the
scheduler lets the row wait until its last token is known and the runner sends fresh bits before each of its steps; others do not wait.
W words of 32 tokens, token t being bit t % 32 of word t // 32; 1 is banned.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from jaxllm.request import RequestError, SamplingParams
from jaxllm.text import Tokenizer


def words(vocab: int) -> int:
    """W, for a vocabulary of so many tokens."""
    return -(-vocab // 32)


def pack(ids: Iterable[int], vocab: int) -> np.ndarray:
    """int32 [W] with the bits of `ids` set."""
    bits = np.zeros(words(vocab) * 32, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


class TokenMask:
    """What one request bans. `phrases`: token sequences that must not be completed. Raises RequestError if nothing is left to draw."""

    def __init__(self, allowed: Iterable[int] | None, phrases: Sequence[tuple[int, ...]], vocab: int):
        self._vocab = vocab
        self._base = np.zeros(words(vocab), np.int32) if allowed is None else ~pack(allowed, vocab)
        self._base |= pack([phrase[0] for phrase in phrases if len(phrase) == 1], vocab)
        self._phrases = [phrase for phrase in phrases if len(phrase) > 1]
        if not self._leaves(self._base):
            raise RequestError("bad_words and allowed_token_ids together leave no token to draw", "allowed_token_ids")

    @property
    def changes(self) -> bool:
        """Do the bits depend on the tokens that were produced?"""
        return bool(self._phrases)

    def banned(self, produced: Sequence[int]) -> np.ndarray:
        """int32 [W] for the token after `produced`. A phrase whose end is the only token left is let pass: some token must come."""
        ends = [phrase[-1] for phrase in self._phrases if tuple(produced[1 - len(phrase) :]) == phrase[:-1]]
        bits = self._base | pack(ends, self._vocab) if ends else self._base
        return bits if self._leaves(bits) else self._base

    def _leaves(self, bits: np.ndarray) -> bool:
        """Is there a token that is not banned?"""
        return bool(np.unpackbits(~bits.view(np.uint8), count=self._vocab, bitorder="little").any())


def mask_of(params: SamplingParams, vocab: int, tokenizer: Tokenizer | None) -> TokenMask | None:
    """What `params` ban; None if that is nothing."""
    if not params.masks:
        return None
    spelled = [] if tokenizer is None else [phrase for word in params.bad_words for phrase in spellings(word, tokenizer)]
    return TokenMask(params.allowed_token_ids, spelled, vocab)


def spellings(word: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """A word's tokens at the beginning of a text and, where they differ, after a space."""
    first = tuple(tokenizer.encode(word.lstrip(), add_special_tokens=False))
    spaced = tuple(tokenizer.encode(" " + word.lstrip(), add_special_tokens=False))
    return [phrase for phrase in dict.fromkeys((first, spaced)) if phrase]
