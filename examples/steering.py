"""Steers some rows of a running engine and not others: a vector taken from two texts, added to the residual stream of one layer.

    python examples/steering.py [MODEL]

The function is compiled into the engine; the vector is data, so every request may bring another one, and nothing recompiles.
"""

import sys
from typing import Any

import jax
import numpy as np

from jaxllm import LLM, Patch, SamplingParams, load


def add(layer, site, value_D, data):
    """Adds a row's vector to every token of the answer and of the prompt from its second token on."""
    return value_D + (data["position"] > 0) * data["strength"] * data["vector"]


def main(path: str | None = None, prompt: str = "Once upon a time, there was a", strength: float = 2.0, tokens: int = 24) -> dict[str, Any]:
    model, params = load(path, dtype="float32")
    assert model.tokenizer is not None
    layer = len(model.config.layers) // 2
    site = (layer, "resid_post")

    # A direction: what the layer holds for one kind of text, less what it holds for another.
    activations = jax.jit(lambda params, tokens: model.activations(params, tokens, [site])[1][site])
    warm, cold = (
        np.array(model.tokenizer.encode(text)) for text in ("The sun was warm. They were happy.", "It was dark. He was cold and sad.")
    )
    direction = np.asarray(activations(params, warm)[1:].mean(0) - activations(params, cold)[1:].mean(0))

    # What the data are worth for rows that bring none: nothing is added.
    patch = Patch(add, {"vector": np.zeros(model.config.d_model, np.float32), "strength": 0.0}, sites=[site])
    params_ = SamplingParams(temperature=0, max_tokens=tokens, logprobs=0)
    with LLM(path, dtype="float32", max_num_seqs=4, max_logprobs=0, max_model_len=256, enforce_eager=True, patch=patch) as llm:
        bring = [None, {"vector": direction, "strength": strength}, {"vector": direction, "strength": -strength}, None]
        alone = llm.generate([prompt], params_, use_tqdm=False)
        together = llm.generate([prompt] * 4, params_, patch=bring, use_tqdm=False)
    for name, output in zip(("as it is", "happier", "sadder", "as it is"), together, strict=True):
        print(f"{name:>9}: {prompt}{output.outputs[0].text}")

    # The pure function takes the same patch and the same data: what steered the engine can be differentiated here.
    steered = together[1]
    answer = [*steered.prompt_token_ids, *steered.outputs[0].token_ids]
    logprobs = jax.jit(lambda params, tokens, data: model.logprobs(params, tokens, patch=patch, data=data))
    exact = logprobs(params, np.array(answer), bring[1])[len(steered.prompt_token_ids) - 1 :]
    return {"alone": alone[0], "together": together, "exact": np.asarray(exact)}


if __name__ == "__main__":
    main(next(iter(sys.argv[1:]), None))
