"""The form an answer must have, compiled by llguidance: schemas, expressions and grammars to matchers that say which tokens may follow.

llguidance is imported, and told this tokenizer's tokens, when a request first asks for a form. Compiling happens in threads of its own,
in which it lets Python's lock go: neither the engine's loop nor an event loop waits for it. Before that, a process that may be killed
compiles it too (trial.py). What was compiled is kept, and every answer gets a copy, which costs microseconds.
"""

import json
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxllm.request import RequestError, StructuredOutputs
from jaxllm.text import Tokenizer
from jaxllm.trial import Trial

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

log = logging.getLogger("jaxllm")

KEPT = 64  # compiled forms
THREADS = 2  # that compile
COMPILE_S = 10.0  # how long a request waits for its form
WHITESPACE = r"( |\n[ \t]{0,20})?"  # between the parts of a JSON text: enough to indent, too little to wander in for ever
# Work is counted in llguidance's units; in time, about 20 ms to begin with and 10 ms for a token, and 40 MB for one answer.
_LIMITS = {
    "max_items_in_row": 500,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 500_000,
    "precompute_large_lexemes": False,  # which takes no account of the other limits
    "verbose_errors": False,
}


class Grammars:
    """The forms that an engine's requests ask for.

    vocab: the model's, which may have more ids than the tokenizer. eos_ids: what may be drawn once a form is complete.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int, eos_ids: frozenset[int]):
        self._tokenizer, self._vocab, self._eos_ids = tokenizer, vocab, eos_ids
        self._pool = ThreadPoolExecutor(THREADS, "jaxllm-grammar")
        self._lock, self._building = threading.Lock(), threading.Lock()
        self._kept: OrderedDict[StructuredOutputs, Future[Compiled]] = OrderedDict()

    def compiled(self, asked: StructuredOutputs) -> "Future[Compiled]":
        """What Matcher takes, when it is there; or RequestError, saying what cannot be honoured. Any thread may ask."""
        with self._lock:
            found = self._kept[asked] = self._kept.pop(asked, None) or self._pool.submit(self._compile, asked)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return found

    def check(self, asked: StructuredOutputs) -> None:
        """Compiles it here and now. Raises RequestError for what cannot be honoured, or takes too long."""
        try:
            self.compiled(asked).result(COMPILE_S)
        except TimeoutError:
            raise too_slow(asked) from None

    def _compile(self, asked: StructuredOutputs) -> "Compiled":
        from llguidance import LLMatcher, LLParserLimits

        tokens = self._tokens()
        try:
            grammar = written(asked)
            if (fault := _trial().fault(grammar, _LIMITS, self._special)) is not None:
                raise _refused(asked, fault)
            made = LLMatcher(tokens, grammar, log_level=0, limits=LLParserLimits(**_LIMITS))
            warnings = made.get_grammar_warnings()
            first = made.deep_copy()
            first.compute_bitmask()  # some limits are met at the first token only
        except RequestError:
            raise
        except ValueError as error:
            raise _refused(asked, str(error)) from None
        except BaseException as error:  # a panic of the library's is no Exception, and must be the end of this request only
            log.exception("compiling a form failed")
            raise _refused(asked, "its compiler failed") from error
        for found in (made.get_error(), *warnings, first.get_error()):
            if found:
                raise _refused(asked, found)
        return Compiled(made, -(-tokens.vocab_size // 32))

    def _tokens(self) -> "LLTokenizer":
        with self._building:
            return self._built

    @cached_property
    def _special(self) -> list[str]:
        return [self._tokenizer.token_text(i) for i in range(self._vocab) if self._tokenizer.is_special(i)]

    @cached_property
    def _built(self) -> "LLTokenizer":
        """In two parts, because each keeps Python's lock: a quarter of a second together for 150,000 tokens."""
        from llguidance import LLTokenizer, TokenizerWrapper

        tokens = _Tokens(self._tokenizer, self._vocab)
        plain = LLTokenizer(TokenizerWrapper(tokens), self._vocab, sorted(self._eos_ids) or None, slices=[])
        tokens.greedy = plain.greedy_tokenize
        return plain.with_slices(LLTokenizer.general_slices())


class Compiled(NamedTuple):
    """A matcher that no token has reached, and the words of 32 tokens that its answers take."""

    start: "LLMatcher"
    words: int


class _Tokens:
    """A Tokenizer in the form llguidance wants: every id's bytes, and a way to spell a text that it can foresee."""

    def __init__(self, tokenizer: Tokenizer, vocab: int):
        self._encode = tokenizer.encode
        self.tokens = [tokenizer.token_bytes(i) for i in range(vocab)]
        self.special_token_ids = [i for i in range(vocab) if tokenizer.is_special(i)]
        self._special = frozenset(self.special_token_ids)
        self.eos_token_id, self.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
        self.greedy: Any = None

    def __call__(self, text: bytes) -> list[int]:
        """Tokens of exactly these bytes, none of them special. A tokenizer that puts a space in front does not spell them by itself."""
        ids = self._encode(text.decode("utf-8", "replace"), add_special_tokens=False)
        known = all(i < len(self.tokens) and i not in self._special for i in ids)
        if self.greedy is None or (known and b"".join(self.tokens[i] for i in ids) == text):
            return ids
        return self.greedy(text.decode("utf-8", "replace"))


class Matcher:
    """Where one answer stands in its form. It is told of every token of the answer, once."""

    def __init__(self, compiled: Compiled):
        self._here, self._words = compiled.start.deep_copy(), compiled.words

    def take(self, token: int) -> None:
        self._here.consume_token(token)

    @property
    def over(self) -> bool:
        """Is the form complete, and may nothing more follow?"""
        return self._here.is_stopped() and not self._here.is_error()

    @property
    def fault(self) -> str | None:
        """Why it cannot go on: a limit was met, or a token taken that was not allowed."""
        return _short(self._here.get_error()) if self._here.is_error() else None

    @staticmethod
    def allowed(matchers: "Sequence[Matcher]") -> np.ndarray:
        """int32 [len(matchers), at least W]: bit t % 32 of word t // 32 is set if token t may follow. Many are asked in parallel."""
        bits = np.zeros((len(matchers), matchers[0]._words), np.int32)
        if len(matchers) == 1:
            matchers[0]._here.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        else:
            places = [(matcher._here, i) for i, matcher in enumerate(matchers)]
            _threads().unsafe_compute_mask_ptr(places, bits.ctypes.data, bits[0].nbytes, len(bits))
        return bits


@cache
def _trial() -> Trial:
    return Trial()


@cache
def _threads() -> "LLExecutor":
    from llguidance import LLExecutor

    return LLExecutor()


def written(asked: StructuredOutputs) -> str:
    """What is asked as llguidance reads it. Raises ValueError for what is none."""
    from llguidance import LLMatcher, grammar_from

    if asked.json is not None or asked.json_object:
        text = str(asked.json) if asked.json is not None else '{"type": "object"}'
        _check_schema(text)
        return LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": WHITESPACE}, overrides={"lenient": False})
    if asked.choice is not None:
        return LLMatcher.grammar_from_regex("|".join(map(re.escape, asked.choice)))
    if asked.regex is not None:
        if re.search(r"(?<!\\)(\\\\)*\\\Z", asked.regex):
            raise ValueError("the expression ends in a lone backslash")
        return LLMatcher.grammar_from_regex(asked.regex)
    return grammar_from("grammar", str(asked.grammar))


# Of older drafts, or of OpenAPI: llguidance passes over them as over any word it does not know, though they change what is valid.
_OLD = ("nullable", "divisibleBy", "disallow", "extends")
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")  # names of the user's to schemas
_DATA = ("const", "enum", "default", "examples")


def _check_schema(text: str) -> None:
    """Raises ValueError for what llguidance would misunderstand in place of refusing it."""
    try:
        schema = json.loads(text)
        if not isinstance(schema, dict):
            raise ValueError("the schema must be an object")
        _check_keywords(schema)
    except RecursionError:
        raise ValueError("the schema is nested too deeply") from None


def _check_keywords(schema: Any) -> None:
    if isinstance(schema, list):
        for each in schema:
            _check_keywords(each)
    if not isinstance(schema, dict):
        return
    if found := [name for name in _OLD if schema.get(name)]:
        raise ValueError(f"the keyword {found[0]} is not of JSON Schema as it is now (draft 2020-12)")
    for name, value in schema.items():
        if name in _BY_NAME and isinstance(value, dict):
            _check_keywords(list(value.values()))
        elif name not in _DATA:
            _check_keywords(value)


def _refused(asked: StructuredOutputs, why: str) -> RequestError:
    return RequestError(f"structured_outputs.{asked.kind} cannot be honoured: {_short(why)}", "structured_outputs")


def too_slow(asked: StructuredOutputs) -> RequestError:
    """For a form that is not compiled in time."""
    return _refused(asked, f"compiling it takes more than {COMPILE_S:.0f} s; make it smaller")


def _short(text: str) -> str:
    """One line of at most 400 characters."""
    return " ".join(text.split("<state>")[0].split("<non-verbose/>")[0].split("<backtrace>")[0].split())[:400]
