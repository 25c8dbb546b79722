"""How often the draft says what the default model says, on conversations that neither has seen, and what that is worth to a server.

    python acceptance.py PREPARED OUT.md [--model FOLDER] [--draft FOLDER] [--answers 40]

The default model answers held-out conversations, once greedily and once with its own sampling; the draft then judges every place of
those answers. Greedy: it agrees where its likeliest token is the one that was taken. Sampled: the probability that speculative sampling
accepts, the sum over tokens of the smaller of the two probabilities (Leviathan et al., 2023), both after temperature and top-p.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from model import SIZES, Params, logits
from prepare import CHAT, TOKEN
from scorecard import short
from train import exported

from jaxllm import LLM, SamplingParams
from jaxllm.source import default_model

CHATS = {
    "stories": ["stories_asked", "tiny_asked"],
    "chats": ["chores", "topical", "gsm8k", "fairytales"],
    "tools": ["tools", "made_up", "sgd"],
}
GUESSES = 4  # tokens that the draft guesses at a time
LENGTH = 1024  # of a conversation and its answer, for one shape


def questions(prepared: Path, sources: list[str], count: int) -> list[list[int]]:
    """Held-out conversations up to where the assistant begins for the first time, `count` of each source."""
    found = []
    for name in sources:
        rows = np.load(prepared / "held_out" / f"{name}.npy")
        begins = [row[: np.flatnonzero(row >= CHAT)[0]] & TOKEN for row in rows if (row >= CHAT).any()]
        found += [b.tolist() for b in begins if len(b) < LENGTH - 256][:count]
    return found


def forward(params: Params, tokens: list[int], size: str) -> np.ndarray:
    """[tokens, V] in float32."""
    padded = np.zeros(LENGTH, np.int32)
    padded[: len(tokens)] = tokens
    return np.asarray(_logits(params, padded[None], size=size)[0, : len(tokens)])


_logits = jax.jit(lambda params, tokens, size: logits(params, tokens, SIZES[size]), static_argnames="size")


def sampled_from(logits_NV: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities [N, V] after temperature and top-p."""
    scaled = logits_NV.astype(np.float64) / params.temperature
    p = np.exp(scaled - scaled.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    order = np.argsort(-p, -1)
    before = np.take_along_axis(p, order, -1).cumsum(-1) - np.take_along_axis(p, order, -1)
    np.put_along_axis(p, order, np.where(before < params.top_p, np.take_along_axis(p, order, -1), 0), -1)
    return p / p.sum(-1, keepdims=True)


def guesses_kept(accepted: np.ndarray) -> np.ndarray:
    """How many of GUESSES guesses the default model keeps, on average, from each place of an answer on: a guess counts if those before it
    were kept. `accepted` holds the probability that each place's guess is."""
    return np.array([np.cumprod(accepted[i : i + GUESSES]).sum() for i in range(len(accepted))])


def measure(llm: LLM, models: dict[str, Params], prompts: list[list[int]], params: SamplingParams) -> tuple[float, float, int]:
    """(share accepted, tokens a step, tokens judged)."""
    answers = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
    shares, steps = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        said, places = [*prompt, *answer], slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        scores = {size: forward(weights, said, size)[places] for size, weights in models.items()}
        if params.temperature == 0:
            accepted = (scores["draft"].argmax(-1) == np.array(answer)).astype(float)
        else:
            accepted = np.minimum(*(sampled_from(s, params) for s in scores.values())).sum(-1)
        shares.append(accepted)
        steps.append(guesses_kept(accepted))
    every = np.concatenate(shares)
    return float(every.mean()), 1 + float(np.concatenate(steps).mean()), len(every)


def report(args: argparse.Namespace) -> str:
    folders = {"default": args.model or default_model(), "draft": args.draft or default_model().parent / "draft_model"}
    models = {size: exported(folder, size) for size, folder in folders.items()}
    lines = ["# Acceptance", "", f"Made by `python {' '.join(map(short, sys.argv))}`.", ""]
    lines += [
        f"| held-out | greedy: accepted | tokens a step, {GUESSES} guesses | sampled: accepted | tokens a step | tokens judged |",
        "|---|---|---|---|---|---|",
    ]
    with LLM(str(folders["default"]), max_num_seqs=16, max_model_len=LENGTH) as llm:
        for kind, sources in CHATS.items():
            prompts = questions(args.prepared, sources, args.answers // len(sources))
            sampled = replace(llm.default_params(), max_tokens=128, seed=0)
            (greedy, taken, n), (likely, yielded, m) = (
                measure(llm, models, prompts, p) for p in (replace(sampled, temperature=0.0), sampled)
            )
            asked = f"{kind}: {len(prompts)} of {', '.join(sources)}"
            lines.append(f"| {asked} | {greedy:.1%} | {taken:.2f} | {likely:.1%} | {yielded:.2f} | {n + m:,} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, default=None, help="a folder; the model that ships if left out")
    parser.add_argument("--draft", type=Path, default=None, help="a folder; the draft that ships if left out")
    parser.add_argument("--answers", type=int, default=24, help="answers of each kind")
    args = parser.parse_args()
    args.out.write_text(report(args))


if __name__ == "__main__":
    main()
