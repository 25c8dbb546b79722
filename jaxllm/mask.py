"""Which tokens a row must not draw next, as packed bits: what structured_outputs, allowed_token_ids and bad_words of a request come to.

A row's bits live on the device and are sent there when the row is admitted. Where they depend on the tokens so far (`changes`), the
runner sends fresh bits for every token: the network runs on the last token before the host has read it, and only the draw waits until it
has. Such a row has one token a dispatch; its neighbours have as many as ever. W words of 32 tokens, token t being bit t % 32 of word
t // 32; 1 is banned.
"""

from collections.abc import Iterable, Sequence
from copy import copy

import numpy as np

from jaxllm.grammar import Compiled, Matcher
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
    """What an answer must not hold. `phrases`: token sequences that must not be completed. `matcher`: the form that one answer must have.

    Raises RequestError if nothing is left to draw.
    """

    def __init__(self, allowed: Iterable[int] | None, phrases: Sequence[tuple[int, ...]], vocab: int):
        self._vocab = vocab
        self.matcher: Matcher | None = None
        self._base = ~pack(range(vocab) if allowed is None else allowed, vocab)  # bits that are no token are banned too
        self._base |= pack([phrase[0] for phrase in phrases if len(phrase) == 1], vocab)
        self._phrases = [phrase for phrase in phrases if len(phrase) > 1]
        self.fault: str | None = None  # why no token can be drawn, once that is so
        if not _leaves(self._base):
            raise RequestError("bad_words and allowed_token_ids together leave no token to draw", "allowed_token_ids")

    def following(self, form: Compiled) -> "TokenMask":
        """The same, for one answer that must have this form."""
        made = copy(self)
        made.matcher = Matcher(form)
        return made

    @property
    def changes(self) -> bool:
        """Do the bits depend on the tokens that were produced?"""
        return bool(self._phrases) or self.matcher is not None

    def take(self, token: int) -> None:
        """The answer has one more token."""
        if self.matcher is not None:
            self.matcher.take(token)
            self.fault = self.fault or self.matcher.fault

    @property
    def over(self) -> bool:
        """Is the answer complete, since its form allows nothing more?"""
        return self.matcher is not None and self.matcher.over

    def banned(self, produced: Sequence[int]) -> np.ndarray:
        """int32 [W] for the token after `produced`."""
        (bits,) = banned([(self, produced)])
        return bits

    def _banned(self, produced: Sequence[int], form: np.ndarray | None) -> np.ndarray:
        """`form`: what the matcher bans. A phrase whose end is the only token left is let pass: some token must come."""
        ends = [phrase[-1] for phrase in self._phrases if tuple(produced[1 - len(phrase) :]) == phrase[:-1]]
        base = self._base if form is None else self._base | form
        bits = base | pack(ends, self._vocab) if ends else base
        if _leaves(bits):
            return bits
        if form is not None and not _leaves(base):
            self.fault = "no token is left to draw: what the form allows next, other parameters forbid"
        return base


def _leaves(bits: np.ndarray) -> bool:
    """Is there a token that is not banned?"""
    return bool((bits != -1).any())


def banned(rows: Sequence[tuple[TokenMask, Sequence[int]]]) -> np.ndarray:
    """int32 [len(rows), W]: what each mask bans after the tokens beside it. Matchers are asked together."""
    matchers = {i: mask.matcher for i, (mask, _) in enumerate(rows) if mask.matcher is not None}
    forms = dict(zip(matchers, ~Matcher.allowed(list(matchers.values())), strict=True)) if matchers else {}
    found = []
    for i, (mask, produced) in enumerate(rows):
        form = forms[i][: len(mask._base)] if i in forms else None
        found.append(mask._banned(produced, form))
        if mask.matcher is not None:
            mask.fault = mask.fault or mask.matcher.fault
    return np.stack(found)


def mask_of(params: SamplingParams, vocab: int, tokenizer: Tokenizer | None, eos_ids: frozenset[int] = frozenset()) -> TokenMask | None:
    """What `params` ban, their structured_outputs apart, which differ from answer to answer; None if that is nothing."""
    if not params.masks:
        return None
    phrases = [] if tokenizer is None else [phrase for word in params.bad_words for phrase in spellings(word, tokenizer)]
    if params.structured_outputs is not None and params.ignore_eos:  # where no end is wanted, an end token is none that a form has
        phrases += [(token,) for token in eos_ids]
    return TokenMask(params.allowed_token_ids, phrases, vocab)


def spellings(word: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """A word's tokens at the beginning of a text and, where they differ, after a space."""
    first = tuple(tokenizer.encode(word.lstrip(), add_special_tokens=False))
    spaced = tuple(tokenizer.encode(" " + word.lstrip(), add_special_tokens=False))
    return [phrase for phrase in dict.fromkeys((first, spaced)) if phrase]
