"""Trains a model on prepared rows: pretraining on everything, then a chat stage that learns the assistant's words alone.

    python train.py PREPARED OUT --size default --pretrain 1500 --chat 1000

Killed and started again with the same arguments it goes on from its last checkpoint and ends with the same parameters: what a step
sees depends on the seed and the step's number only. OUT gets checkpoint.npz, log.jsonl and, at the end and at each checkpoint,
the weights in Hugging Face's layout in files small enough to carry.
"""

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from model import SIZES, Params, Size, init, logits
from optax.contrib import muon
from prepare import CHAT, PRETRAIN, TOKEN
from safetensors.numpy import load_file, save_file

# Of how many rows in a hundred each source is, in the two stages. Real stories are few: more of them would be
# learned by heart.
MIXTURES = {
    "pretrain": {
        "tiny": 3,
        "tiny_asked": 2,
        "picture_books": 2,
        "books": 12,
        "wiki": 9,
        "news": 1.5,
        "stories": 11,
        "stories_asked": 14,
        "chores": 9,
        "tools": 10,
        "sgd": 20,
        "taskmaster": 0.7,
        "topical": 3,
        "gsm8k": 2,
        "fairytales": 2.5,
    },
    "chat": {
        "tiny": 1,
        "tiny_asked": 5,
        "picture_books": 0.5,
        "stories": 1,
        "stories_asked": 23,
        "chores": 17,
        "tools": 14,
        "sgd": 32,
        "taskmaster": 0.5,
        "topical": 1.5,
        "gsm8k": 1.5,
        "fairytales": 2.5,
    },
}
SHARD_BYTES = 15 * 2**20


class Rows:
    """All sources' rows; `batch` draws from them by the stage's mixture."""

    def __init__(self, folder: Path):
        self._rows = {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}

    def batch(self, stage: str, step: int, count: int, seed: int) -> np.ndarray:
        """[count, row length], the same for the same arguments."""
        random = np.random.default_rng((seed, step))
        weights = {name: w for name, w in MIXTURES[stage].items() if len(self._rows.get(name, ()))}
        share = np.array(list(weights.values())) / sum(weights.values())
        names = random.choice(list(weights), size=count, p=share)
        return np.stack([self._rows[n][random.integers(len(self._rows[n]))] for n in names])

    def held_out(self, count: int) -> dict[str, np.ndarray]:
        return {name: rows[:count] for name, rows in self._rows.items() if len(rows)}


def loss(params: Params, rows_BT: jax.Array, bit: jax.Array, size: Size, attention: str) -> jax.Array:
    """Mean negative log-likelihood, in nats a token, of the tokens that carry `bit`. Computed in bfloat16, summed in float32."""
    half = {name: p.astype(jnp.bfloat16) for name, p in params.items()}
    tokens = (rows_BT & TOKEN).astype(jnp.int32)
    learned = ((rows_BT[:, 1:] & bit) != 0).astype(jnp.float32)
    scores = logits(half, tokens[:, :-1], size, attention)
    nats = optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:])
    return (nats * learned).sum() / jnp.maximum(learned.sum(), 1)


def optimizer() -> optax.GradientTransformation:
    """Muon for matrices, Adam for embedding and norms, at learning rate 1: the step scales by what the schedule says."""
    clip = optax.clip_by_global_norm(1.0)

    def matrices(params):  # out is the first axis; the embedding is a table and no map
        return {n: optax.contrib.MuonDimensionNumbers((1,), (0,)) if n.endswith("_proj.weight") else None for n in params}

    return optax.chain(clip, muon(1.0, consistent_rms=0.2, weight_decay=0.05, adam_b2=0.98, muon_weight_dimension_numbers=matrices))


@partial(jax.jit, static_argnames=("size", "attention"), donate_argnums=(0, 1))
def train_step(params: Params, state, rows_BT: jax.Array, bit: jax.Array, rate: jax.Array, size: Size, attention: str):
    value, grads = jax.value_and_grad(loss)(params, rows_BT, bit, size, attention)
    updates: Any
    updates, state = optimizer().update(grads, state, params)
    return {name: p + rate * updates[name] for name, p in params.items()}, state, value


held_out_loss = jax.jit(loss, static_argnames=("size", "attention"))


def rate_at(step: int, pretrain: int, chat: int, peak: float, warmup: int = 100) -> float:
    """Up, level while pretraining, and down to nothing over the chat stage."""
    if step < pretrain:
        return peak * min(1.0, (step + 1) / warmup)
    return peak * (pretrain + chat - step) / max(chat, 1)


def save(path: Path, step: int, trees) -> None:
    """Written beside and moved in place, so that a kill leaves the old checkpoint or the new one."""
    leaves: dict[str, Any] = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(trees))}
    with open(path.with_suffix(".part"), "wb") as file:
        np.savez(file, step=step, **leaves)
    os.replace(path.with_suffix(".part"), path)


def restore(path: Path, trees):
    """(step, trees): the numbers of `path` in the shape of `trees`."""
    with np.load(path) as saved:
        leaves = [jnp.asarray(saved[f"leaf_{i}"]) for i in range(len(jax.tree.leaves(trees)))]
        return int(saved["step"]), jax.tree.unflatten(jax.tree.structure(trees), leaves)


def export(folder: Path, params: Params, prefix: str) -> None:
    """bfloat16 safetensors, in files of at most SHARD_BYTES, as Hugging Face names them."""
    parts: list[dict[str, np.ndarray]] = [{}]
    for name, p in params.items():
        value = np.asarray(p).astype(ml_dtypes.bfloat16)
        if sum(v.nbytes for v in parts[-1].values()) + value.nbytes > SHARD_BYTES:
            parts.append({})
        parts[-1][name] = value
    for i, part in enumerate(parts, 1):
        save_file(part, folder / f"{prefix}-{i:05d}-of-{len(parts):05d}.safetensors", metadata={"format": "pt"})


def exported(folder: Path, prefix: str) -> Params:
    """What `export` wrote, in float32 again."""
    found = {name: p for path in sorted(folder.glob(f"{prefix}-*.safetensors")) for name, p in load_file(path).items()}
    return {name: jnp.asarray(p, jnp.float32) for name, p in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="default")
    parser.add_argument("--pretrain", type=int, default=1500, help="steps of the first stage")
    parser.add_argument("--chat", type=int, default=1000, help="steps of the second")
    parser.add_argument("--rows", type=int, default=128, help="rows of 2,048 tokens in a step")
    parser.add_argument("--rate", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--stop-at", type=int, default=None, help="stop after this step, to be gone on with later")
    parser.add_argument("--start", type=Path, default=None, help="begin from the weights exported there, with new moments")
    parser.add_argument("--carry", type=Path, default=None, help="another folder for the log and the exported weights")
    args = parser.parse_args()
    train(args)


def train(args: argparse.Namespace) -> Params:
    size, started = SIZES[args.size], time.monotonic()
    carry = args.carry or args.out
    args.out.mkdir(parents=True, exist_ok=True)
    attention = "cudnn" if jax.default_backend() == "gpu" else "xla"
    rows, checkpoint = Rows(args.prepared / "train"), args.out / f"checkpoint-{args.size}.npz"
    params = init(size, args.seed) if args.start is None else exported(args.start, args.size)
    state, first, total = optimizer().init(params), 0, args.pretrain + args.chat
    if checkpoint.exists():
        first, (params, state) = restore(checkpoint, (params, state))

    def note(**facts) -> None:
        line = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in facts.items()})
        print(line, flush=True)
        with open(carry / f"log-{args.size}.jsonl", "a") as log:
            print(line, file=log)

    def judge(step: int, stage: str) -> None:
        bit = jnp.uint16(PRETRAIN if stage == "pretrain" else CHAT)
        held = Rows(args.prepared / "held_out").held_out(16)
        values = {n: held_out_loss(params, jnp.asarray(r), bit, size=size, attention=attention) for n, r in held.items() if len(r) == 16}
        note(step=step, stage=stage, held_out={n: round(float(v), 4) for n, v in values.items()})

    note(size=args.size, parameters=sum(p.size for p in params.values()), first=first, total=total, rows=args.rows, rate=args.rate)
    last, last_at, recent = time.monotonic(), first, []
    for step in range(first, min(total, args.stop_at or total)):
        stage = "pretrain" if step < args.pretrain else "chat"
        batch = rows.batch(stage, step, args.rows, args.seed)
        bit, rate = jnp.uint16(PRETRAIN if stage == "pretrain" else CHAT), rate_at(step, args.pretrain, args.chat, args.rate)
        params, state, value = train_step(params, state, batch, bit, jnp.float32(rate), size=size, attention=attention)
        recent.append(value)  # a device array: nobody waits for it here
        done = step + 1
        if done % 20 == 0 or done == total:
            mean, now = float(jnp.stack(recent).mean()), time.monotonic()
            speed = (done - last_at) * args.rows * (batch.shape[1] - 1) / (now - last)
            note(step=done, stage=stage, loss=mean, rate=rate, tokens_per_second=int(speed), seconds=now - started)
            last, last_at, recent = now, done, []
        if done in (args.pretrain, total):
            judge(done, stage)
        if done % args.save_every == 0 or done == total or done == args.stop_at:
            save(checkpoint, done, (params, state))
            export(carry, params, args.size)
    return params


if __name__ == "__main__":
    main()
