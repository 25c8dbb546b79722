"""Small real engines: a golden checkpoint's decoder behind a Runner and Core, and the naive loop they must agree with."""

import contextlib
import dataclasses
from functools import cache

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tiny import decoder

from jaxllm.core import Core, Refusal
from jaxllm.decoder import DenseContext
from jaxllm.parallel import make_mesh
from jaxllm.plan import Bucket, Plan
from jaxllm.request import Output, Request
from jaxllm.runner import Runner

LONGEST = 48
LANES = 6  # more than the four rows there may be, as on a GPU, where lanes come by the eight
BUCKETS = tuple(sorted({Bucket(0, 1), Bucket(0, LANES), Bucket(4, LANES), Bucket(16, LANES)}))
EOS = frozenset({3})
COMPILED = "/jax/core/compile/backend_compile_duration"


def make_plan(**changes) -> Plan:
    plan = Plan(
        dtype="float32",
        max_model_len=LONGEST,
        page_size=4,
        num_pages=48,
        max_num_seqs=4,
        buckets=BUCKETS,
        scored=Bucket(4, 1, scored=True),
        enable_prefix_caching=True,
        max_logprobs=5,
        tensor_parallel_size=1,
        decode_steps=3,
    )
    return dataclasses.replace(plan, **changes)


def runner(name: str, devices: int = 1, kv_dtype: str | None = None) -> Runner:
    """Compiled once a process; the pages it writes outlive a Core, as no Core trusts a page it did not fill itself."""
    return _runner(name, devices, kv_dtype)


@cache  # which tells an argument that is given from the same one left out
def _runner(name: str, devices: int, kv_dtype: str | None) -> Runner:
    plan = make_plan(tensor_parallel_size=devices, kv_dtype=kv_dtype)
    model = decoder(name, devices)
    mesh = make_mesh(jax.devices()[:devices])
    made = Runner(model, plan, mesh, "reference")
    made.compile()
    made.start(model)
    return made


def core(name: str, devices: int = 1, tokenizer=None, kv_dtype: str | None = None, **changes) -> Core:
    """A fresh scheduler over the shared runner. `changes` may use fewer pages or buckets than were compiled, never others."""
    made = runner(name, devices, kv_dtype)
    return Core(made, make_plan(kv_dtype=kv_dtype, **changes), made.model.vocab_size, EOS, tokenizer, seed=0)


@contextlib.contextmanager
def counted_compilations():
    seen: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


class Gather:
    """Collects a request's outputs."""

    def __init__(self):
        self.outputs: list[Output] = []

    def __call__(self, heard: Output | Refusal) -> None:
        assert isinstance(heard, Output), f"refused: {heard.error}"
        self.outputs.append(heard)

    def tokens(self, index: int = 0) -> list[int]:
        return [t for o in self.outputs for c in o.outputs if c.index == index for t in c.token_ids]

    def logprobs(self, index: int = 0) -> list:
        return [lp for o in self.outputs for c in o.outputs if c.index == index for lp in c.logprobs or ()]

    @property
    def reason(self):
        return self.outputs[-1].outputs[-1].finish_reason


def answer(engine: Core, *requests: Request) -> list[Gather]:
    gathers = [Gather() for _ in requests]
    for request, gather in zip(requests, gathers, strict=True):
        engine.add(request, gather)
    finish(engine)
    return gathers


def finish(engine: Core) -> None:
    while engine.turn():
        pass
    stats = engine.stats()
    assert stats.held == 0 and stats.free + stats.cached == stats.pages


@cache
def _dense(name: str):
    model = decoder(name)
    graphdef, state = nnx.split(model)

    @jax.jit
    def forward(state, tokens_N):
        model = nnx.merge(graphdef, state)
        hidden_ND, _ = model(tokens_N, jnp.arange(LONGEST), None, DenseContext())
        return model.logits(hidden_ND)

    return lambda tokens: np.asarray(forward(state, tokens))


def dense_logits(name: str, tokens) -> np.ndarray:
    """Logits [len(tokens), V] by plain causal attention over the one sequence; what follows it is padding that it cannot see."""
    padded = np.zeros(LONGEST, np.int32)
    padded[: len(tokens)] = tokens
    return _dense(name)(padded)[: len(tokens)]


def naive(name: str, prompt, count: int, stop_ids=frozenset()) -> list[int]:
    """Greedy, one request, no cache, no batch."""
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + count, LONGEST):
        tokens.append(int(dense_logits(name, tokens)[-1].argmax()))
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]
