"""A model as a pure function: logits, log-probabilities of a text, many prompts at once, a gradient, and what a layer sees.

python examples/pure_function.py [MODEL]
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import load


def main(path: str | None = None, text: str = "Once upon a time, there was a little girl.") -> dict[str, Any]:
    model, params = load(path, dtype="float32")
    tokenizer = model.tokenizer
    assert tokenizer is not None
    tokens = np.array(tokenizer.encode(text))

    # Row n of the logits is about the token after token n. jit compiles once for each length.
    logits_NV = jax.jit(model.forward)(params, tokens)
    following = tokenizer.decode([int(logits_NV[-1].argmax())])
    print(f"{text!r} goes on with {following!r}")

    # How likely is each token of a given text?
    logprobs = jax.jit(model.logprobs)(params, tokens)
    for token, logprob in zip(tokens[1:], logprobs, strict=True):
        print(f"  {logprob:8.4f}  {tokenizer.decode([int(token)])!r}")

    # Many prompts at once. Padding comes at the end, where no token looks.
    prompts = [tokenizer.encode(prompt) for prompt in ("The cat", "The little dog ran")]
    padded = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    batch_BNV = jax.jit(jax.vmap(model.forward, in_axes=(None, 0)))(params, padded)

    # The gradient of any loss, in the same dict of tensors as the parameters.
    gradient = jax.jit(jax.grad(lambda params: -model.logprobs(params, tokens).mean()))(params)
    norms = {name: float(jnp.linalg.norm(g)) for name, g in gradient.items()}
    print("the largest gradient is that of", max(norms, key=lambda name: norms[name]))

    # The logit lens: what would each layer say, if it were the last? And where does a middle layer look?
    last, middle = len(model.config.layers) - 1, len(model.config.layers) // 2
    sites = [*((layer, "resid_post") for layer in range(last + 1)), (middle, "attention")]
    _, seen = jax.jit(lambda params, tokens: model.activations(params, tokens, sites))(params, tokens)
    for layer in range(last + 1):
        said = tokenizer.decode([int(model.head(params, seen[layer, "resid_post"][-1:]).argmax())])
        print(f"  after layer {layer}: {said!r}")
    looks_QN = seen[middle, "attention"][:, -1]
    print(f"in layer {middle}, head 0 looks most at {tokenizer.decode([int(tokens[looks_QN[0].argmax()])])!r}")
    return {"model": model, "params": params, "tokens": tokens, "logits": logits_NV, "logprobs": logprobs, "batch": batch_BNV,
            "prompts": prompts, "gradient": gradient, "looks": looks_QN, "last": seen[last, "resid_post"]}  # fmt: skip


if __name__ == "__main__":
    main(next(iter(sys.argv[1:]), None))
