"""Fine-tunes a model on a text with optax, saves it, and serves it: on a CPU, the default model takes minutes.

python examples/fine_tune.py FOLDER [MODEL]     # then: jaxllm serve FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jaxllm import LLM, SamplingParams, load

TEXT = """Once upon a time, there was a robot named Beep. Beep lived on the moon. Every day Beep looked at the blue Earth and waved.
One day a bird came to the moon. "Hello," said the bird. "My name is Pip." Beep was so happy. Beep and Pip looked at the Earth together.
They waved and waved. Beep was not alone any more. They were best friends, and they lived on the moon.
"""


def main(folder: str, path: str | None = None, text: str = TEXT, steps: int = 200, rows: int = 8, length: int = 64) -> dict[str, Any]:
    """The loss on the text before and after, and how the saved model goes on."""
    model, params = load(path, dtype="float32")
    assert model.tokenizer is not None
    tokens, draw = np.array(model.tokenizer.encode(text)), np.random.default_rng(0)
    length = min(length, len(tokens) - 1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-3, steps), weight_decay=0.0))

    def loss(params, batch_BN):
        return -jax.vmap(model.logprobs, (None, 0))(params, batch_BN).mean()

    @jax.jit
    def learn(params, state, batch_BN):
        value, gradient = jax.value_and_grad(loss)(params, batch_BN)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for step in range(steps):
        starts = draw.integers(0, len(tokens) - length, rows)
        params, state, value = learn(params, state, np.stack([tokens[start : start + length + 1] for start in starts]))
        losses.append(float(value))
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:4}: loss {losses[-1]:.3f}")

    model.save(params, folder)
    with LLM(folder, max_num_seqs=1, max_model_len=256, enforce_eager=True) as llm:
        (output,) = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
    print(f"{Path(folder).name} now says: Once upon a time{output.outputs[0].text}")
    return {"losses": losses, "text": output.outputs[0].text}


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], next(iter(sys.argv[2:]), None))
