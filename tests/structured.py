"""Schemas of many features from a seed, and a model that finds every allowed token equally likely, drawn through the real masks."""

import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from engines import make_plan

from jaxllm import mask, sample
from jaxllm.batch import StepResult
from jaxllm.core import Core
from jaxllm.plan import Bucket
from jaxllm.scheduler import Step
from jaxllm.text import Tokenizer

ROWS = 16
WORDS = ("name", "age", "tags", "a b", "größe", "x-y", "id", "to", "日本", 'quote"d')


def plan(longest: int = 2048, **changes: Any):
    buckets = (Bucket(0, ROWS), Bucket(64, ROWS))
    return make_plan(
        max_model_len=longest, page_size=64, num_pages=ROWS * longest // 64, max_num_seqs=ROWS, buckets=buckets, decode_steps=1, **changes
    )


@jax.jit
def _draw(logits, banned, floats, ints, position):
    return sample.sample(sample.mask(logits, banned), sample.Sampling.unpack(floats, ints), position)


class UniformRunner:
    """No network: logits are zeros, unless `favour` says which ids are likelier; masks, bans and draw are the real ones."""

    def __init__(self, vocab: int, favour: dict[int, float] | None = None):
        self.vocab, self.draws = vocab, 0
        self._logits = jnp.zeros((ROWS, vocab))
        for token, value in (favour or {}).items():
            self._logits = self._logits.at[:, token].set(value)

    def run(self, step: Step) -> "_Drawing":
        return _Drawing(self, step)

    def choose(self, step: Step) -> list[int]:
        self.draws += 1
        rows = [(i, row) for i, row in enumerate(step.rows) if row.samples and not row.sequence.finished]
        banned = np.zeros((ROWS, mask.words(self.vocab)), np.int32)
        masked = [(i, r.sequence) for i, r in rows if r.sequence.mask is not None]
        if masked:
            banned[[i for i, _ in masked]] = mask.banned([(s.mask, s.tokens[s.prompt_len :]) for _, s in masked if s.mask is not None])
        packed = [sample.Sampling.pack(row.sequence.params, row.sequence.seed) for _, row in rows]
        floats, ints = np.zeros((ROWS, sample.FLOATS), np.float32), np.zeros((ROWS, sample.INTS), np.int32)
        position = np.zeros(ROWS, np.int32)
        for (i, row), (f, n) in zip(rows, packed, strict=True):
            floats[i], ints[i], position[i] = f, n, row.start + row.count
        return _draw(self._logits, banned, floats, ints, position).tolist()


class _Drawing:
    def __init__(self, runner: UniformRunner, step: Step):
        self._runner, self._step = runner, step
        self._tokens: list[int] | None = None

    def draw(self) -> None:
        if self._tokens is None:
            self._tokens = self._runner.choose(self._step)

    def read(self) -> StepResult:
        assert self._tokens is not None
        return StepResult([[token] for token in self._tokens])


def uniform(tokenizer: Tokenizer, eos: int, longest: int = 2048, favour: dict[int, float] | None = None, **changes: Any) -> Core:
    return Core(UniformRunner(tokenizer.vocab_size, favour), plan(longest, **changes), tokenizer.vocab_size, frozenset({eos}), tokenizer, 0)


def schema(seed: int) -> dict[str, Any]:
    """A schema, of up to three levels, that something satisfies."""
    r = random.Random(seed)
    made = _object(r, 3) if r.random() < 0.7 else _any(r, 3)
    if r.random() < 0.3:
        made = {"$defs": {"Part": _any(r, 1)}, "type": "object", "additionalProperties": False, "required": ["part"]}
        made["properties"] = {
            "part": {"$ref": "#/$defs/Part"},
            "parts": {"type": "array", "items": {"$ref": "#/$defs/Part"}, "maxItems": 3},
        }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"Schema {seed}"} | made


def _any(r: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_string, _number, _integer, _enum, _const, _plain, _nullable]
    return r.choice(kinds + [_object, _array, _any_of, _all_of, _tuple] * (depth > 0))(r, depth - 1)


def _object(r: random.Random, depth: int) -> dict[str, Any]:
    names = r.sample(WORDS, r.randint(1, 5))
    made: dict[str, Any] = {"type": "object", "properties": {name: _any(r, depth - 1) for name in names}}
    made["required"] = names if r.random() < 0.5 else r.sample(names, r.randint(0, len(names)))
    if r.random() < 0.8:
        made["additionalProperties"] = False
    elif r.random() < 0.5:
        made["additionalProperties"] = {"type": r.choice(["integer", "boolean", "null"])}
    if r.random() < 0.2:
        made["description"] = "what nobody reads"
    return made


def _array(r: random.Random, depth: int) -> dict[str, Any]:
    low = r.randint(0, 2)
    return {"type": "array", "items": _any(r, depth - 1), "minItems": low, "maxItems": low + r.randint(0, 3)}


def _tuple(r: random.Random, depth: int) -> dict[str, Any]:
    items = [_any(r, depth - 1) for _ in range(r.randint(1, 3))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def _string(r: random.Random, depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "string"}
    how = r.randrange(6)
    if how == 0:
        made["pattern"] = r.choice([r"^[A-Z]{2}-\d{1,4}$", r"^(red|green|blue)+$", r"^\w{1,8}$", r"[aeiou]", r"^[^\s]{3,9}$", r"^a*b?$"])
    elif how == 1:
        made["format"] = r.choice(["ipv4", "uuid", "email", "time", "ipv6"])
    elif how < 5:
        made["minLength"] = r.randint(0, 4)
        made["maxLength"] = made["minLength"] + r.randint(0, 20)
    return made


def _number(r: random.Random, depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "number"}
    low = round(r.uniform(-100, 100), r.randint(0, 3))
    if r.random() < 0.7:
        made[r.choice(["minimum", "exclusiveMinimum"])] = low
    if r.random() < 0.7:
        made[r.choice(["maximum", "exclusiveMaximum"])] = round(low + r.uniform(0.5, 50), 3)
    return made


def _integer(r: random.Random, depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "integer"}
    low = r.randint(-1000, 1000)
    if r.random() < 0.7:
        made[r.choice(["minimum", "exclusiveMinimum"])] = low
    if r.random() < 0.7:
        made[r.choice(["maximum", "exclusiveMaximum"])] = low + r.randint(2, 10_000)
    if r.random() < 0.2:
        made = {"type": "integer", "multipleOf": r.choice([2, 5, 10])}
    return made


def _enum(r: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": r.sample([1, 2.5, "red", 'gr"een', None, True, False, {"a": [1]}, [], "ünï"], r.randint(1, 5))}


def _const(r: random.Random, depth: int) -> dict[str, Any]:
    return {"const": r.choice(["fixed", 42, -1.5, None, True, {"k": "v", "n": [1, 2]}, []])}


def _plain(r: random.Random, depth: int) -> dict[str, Any]:
    return {"type": r.choice(["boolean", "null", "integer", "number"])}


def _nullable(r: random.Random, depth: int) -> dict[str, Any]:
    return {"type": [r.choice(["string", "integer", "boolean"]), "null"]}


def _any_of(r: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(r, depth - 1) for _ in range(r.randint(2, 3))]}


def _all_of(r: random.Random, depth: int) -> dict[str, Any]:
    return {"allOf": [{"type": "string", "minLength": r.randint(0, 3)}, {"maxLength": r.randint(4, 12)}]}
