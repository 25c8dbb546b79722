"""The pure function beside the paged engine: a golden's Model, and the logits of every token that an engine sampled."""

from functools import cache

import jax
import numpy as np
from engines import LONGEST, answer, make_plan
from tiny import GOLDENS

from converters.checkpoint import open_checkpoint
from jaxllm.core import Core
from jaxllm.loading import load_params
from jaxllm.parallel import make_mesh
from jaxllm.request import Request, SamplingParams
from jaxllm.research import Model
from jaxllm.runner import Runner


@cache
def model(name: str, dtype: str = "float32", devices: int = 1) -> tuple[Model, dict[str, jax.Array]]:
    checkpoint = open_checkpoint(GOLDENS / name)
    network, mesh = checkpoint.config.for_context(LONGEST), make_mesh(jax.devices()[:devices])
    return Model(network, None, mesh, checkpoint), load_params(checkpoint, network, mesh, dtype)


class Watched:
    """A runner whose logits are kept: by request, and the position of the token they came from."""

    def __init__(self, made: Runner):
        self.made = made
        self.logits: dict[tuple[str, int], np.ndarray] = {}

    def run(self, step):
        handle = self.made.run(step)
        logits = np.array(self.made._ports[step.bucket.rows].logits_MV)
        for i, row in enumerate(step.rows):
            if row.samples:
                self.logits[row.sequence.request.id, row.start + row.count - 1] = logits[i]
        return handle


def watched_answers(made: Runner, *requests: Request, **changes):
    """The logits of every sampled token, and the gathered outputs."""
    watched = Watched(made)
    plan = make_plan(dtype=made.plan.dtype, decode_steps=1, **changes)  # logits of every token
    gathers = answer(Core(watched, plan, made.model.vocab_size, frozenset(), None, patch=made.patch), *requests)
    return watched.logits, gathers


def greedy(name: str, prompt, count: int = 8, patch=None) -> Request:
    return Request(name, tuple(int(t) for t in prompt), SamplingParams(temperature=0, max_tokens=count), patch=patch)


def worst(logits, gathers, requests, forward) -> float:
    """The largest difference between the engine's logits and the pure function's, relative to the largest logit."""
    differences, scale = [], 0.0
    for request, gather in zip(requests, gathers, strict=True):
        tokens = [*request.prompt_token_ids, *gather.tokens()]
        padded = np.zeros(LONGEST, np.int32)
        padded[: len(tokens)] = tokens
        want = np.asarray(forward(padded))
        found = {place: row for (name, place), row in logits.items() if name == request.id}
        assert sorted(found) == list(range(len(request.prompt_token_ids) - 1, len(tokens) - 1))
        differences += [np.abs(row - want[place]).max() for place, row in found.items()]
        scale = max(scale, np.abs(want).max())
    return float(max(differences) / scale)
