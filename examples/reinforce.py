"""A reinforcement-learning loop: sample with the engine, take a policy-gradient step through the same parameters, swap them in.

    python examples/reinforce.py [MODEL]

The reward is a toy: how often an answer says one letter. REINFORCE with the mean reward as its baseline.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxllm import LLM, Output, SamplingParams, load


def main(
    path: str | None = None, prompt: str = "Once upon a time", letter: str = "o", rounds: int = 12, rows: int = 32, tokens: int = 24
) -> list[float]:
    """The mean reward of each round."""
    model, params = load(path, dtype="float32")
    optimizer = optax.adam(1e-3)
    state = optimizer.init(params)

    def loss(params, answers_BN, drawn_BN, advantage_B):
        logprobs_BN = jax.vmap(model.logprobs, (None, 0))(params, answers_BN)
        return -((logprobs_BN * drawn_BN).sum(-1) * advantage_B).mean()

    @jax.jit  # The engine keeps the arrays it is given, so they are not donated here.
    def learn(params, state, *batch):
        updates, state = optimizer.update(jax.grad(loss)(params, *batch), state)
        return optax.apply_updates(params, updates), state

    how = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True)
    rewards = []
    with LLM(path, dtype="float32", max_num_seqs=rows, max_model_len=128, max_num_batched_tokens=128, enforce_eager=True) as llm:
        for round_ in range(rounds):
            outputs = llm.generate([prompt] * rows, how, use_tqdm=False)
            reward_B = np.array([output.outputs[0].text.count(letter) for output in outputs], np.float32)
            advantage_B = (reward_B - reward_B.mean()) / (reward_B.std() + 1e-6)
            params, state = learn(params, state, *arrays(outputs), advantage_B)
            llm.update_params(params)
            rewards.append(float(reward_B.mean()))
            print(f"round {round_:2}: {rewards[-1]:6.2f} times {letter!r} in {tokens} tokens; {outputs[0].outputs[0].text!r}")
    return rewards


def arrays(outputs: list[Output]) -> tuple[Any, Any]:
    """Prompts with their answers [B, N], and which of the tokens after the first were drawn [B, N - 1]."""
    answers = [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in outputs]
    drawn = [[0.0] * (len(output.prompt_token_ids) - 1) + [1.0] * len(output.outputs[0].token_ids) for output in outputs]
    return jnp.array(answers), jnp.array(drawn)


if __name__ == "__main__":
    main(next(iter(sys.argv[1:]), None))
