"""Trains a model on prepared rows: pretraining on everything, then two stages that learn the assistant's words alone.

    python train.py PREPARED OUT --size default --pretrain 1500 --chat 1000 --finish 1200

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

# Of how many rows in a hundred each source is, in each stage. Real stories are few: more of them would be learned by heart. So are the
# functions of the tool dialogues: the last stage has them under names that only the schema knows.
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
    "finish": {
        "tiny": 1,
        "tiny_asked": 4,
        "picture_books": 0.5,
        "stories": 1,
        "stories_asked": 20,
        "chores": 16,
        "tools": 8,
        "made_up": 14,
        "sgd_renamed": 30,
        "taskmaster": 0.5,
        "topical": 1.5,
        "gsm8k": 1.5,
        "fairytales": 2,
    },
}
TEACHER = SIZES["default"]
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


def loss(params: Params, rows_BT: jax.Array, bit: jax.Array, size: Size, attention: str, teacher: Params | None = None) -> jax.Array:
    """Mean cross-entropy, in nats a token, at the tokens that carry `bit`: with the token that is there, or with what a teacher (TEACHER's
    parameters) thinks of every token. Computed in bfloat16, summed in float32."""
    tokens = (rows_BT & TOKEN).astype(jnp.int32)
    learned = ((rows_BT[:, 1:] & bit) != 0).astype(jnp.float32)
    scores = logits(half(params), tokens[:, :-1], size, attention)
    if teacher is None:
        nats = optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:])
    else:
        nats = optax.softmax_cross_entropy(scores, jax.nn.softmax(logits(teacher, tokens[:, :-1], TEACHER, attention)))
    return (nats * learned).sum() / jnp.maximum(learned.sum(), 1)


def half(params: Params) -> Params:
    return {name: p.astype(jnp.bfloat16) for name, p in params.items()}


def optimizer() -> optax.GradientTransformation:
    """Muon for matrices, Adam for embedding and norms, at learning rate 1: the step scales by what the schedule says."""
    clip = optax.clip_by_global_norm(1.0)

    def matrices(params):  # out is the first axis; the embedding is a table and no map
        return {n: optax.contrib.MuonDimensionNumbers((1,), (0,)) if n.endswith("_proj.weight") else None for n in params}

    return optax.chain(clip, muon(1.0, consistent_rms=0.2, weight_decay=0.05, adam_b2=0.98, muon_weight_dimension_numbers=matrices))


@partial(jax.jit, static_argnames=("size", "attention"), donate_argnums=(0, 1))
def train_step(params: Params, state, rows_BT: jax.Array, bit: jax.Array, rate: jax.Array, size: Size, attention: str, teacher=None):
    value, grads = jax.value_and_grad(loss)(params, rows_BT, bit, size, attention, teacher)
    updates: Any
    updates, state = optimizer().update(grads, state, params)
    return {name: p + rate * updates[name] for name, p in params.items()}, state, value


held_out_loss = jax.jit(loss, static_argnames=("size", "attention"))


def stage_at(step: int, counts: dict[str, int], peak: float, warmup: int = 100) -> tuple[str, float]:
    """(stage, learning rate): up, level while pretraining, down to nothing over the chat stage, and once more up and down."""
    stages = iter(counts.items())
    stage, count = next(stages)
    while step >= count:
        step -= count
        stage, count = next(stages)
    up = 1.0 if stage == "chat" else min(1.0, (step + 1) / warmup)
    return stage, peak * up * (1.0 if stage == "pretrain" else (count - step) / count)


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
    """What `export` wrote, or ship.py, in float32 again."""
    paths = sorted(folder.glob(f"{prefix}-*.safetensors")) or [folder / "model.safetensors"]
    found = {name: p for path in paths for name, p in load_file(path).items()}
    return {name: jnp.asarray(p, jnp.float32) for name, p in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="default")
    parser.add_argument("--pretrain", type=int, default=1500, help="steps of the first stage")
    parser.add_argument("--chat", type=int, default=1000, help="steps of the second")
    parser.add_argument("--finish", type=int, default=0, help="steps of the third")
    parser.add_argument("--rows", type=int, default=128, help="rows of 2,048 tokens in a step")
    parser.add_argument("--rate", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--stop-at", type=int, default=None, help="stop after this step, to be gone on with later")
    parser.add_argument("--start", type=Path, default=None, help="begin from the weights exported or shipped there, with new moments")
    parser.add_argument("--teacher", type=Path, default=None, help="learn what the default model exported there thinks, not the text")
    parser.add_argument("--carry", type=Path, default=None, help="another folder for the log and the exported weights")
    args = parser.parse_args()
    train(args)


def train(args: argparse.Namespace) -> Params:
    size, started = SIZES[args.size], time.monotonic()
    carry = args.carry or args.out
    args.out.mkdir(parents=True, exist_ok=True)
    attention = "cudnn" if jax.default_backend() == "gpu" else "xla"
    rows, held_out = Rows(args.prepared / "train"), Rows(args.prepared / "held_out").held_out(16)
    checkpoint = args.out / f"checkpoint-{args.size}.npz"
    params = init(size, args.seed) if args.start is None else exported(args.start, args.size)
    teacher = None if args.teacher is None else half(exported(args.teacher, "default"))
    counts = {"pretrain": args.pretrain, "chat": args.chat, "finish": args.finish}
    state, first, total = optimizer().init(params), 0, sum(counts.values())
    if checkpoint.exists():
        first, (params, state) = restore(checkpoint, (params, state))

    def note(**facts) -> None:
        line = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in facts.items()})
        print(line, flush=True)
        with open(carry / f"log-{args.size}.jsonl", "a") as log:
            print(line, file=log)

    def judge(step: int, stage: str, bit: jax.Array) -> None:
        values = {
            n: held_out_loss(params, jnp.asarray(r), bit, size=size, attention=attention) for n, r in held_out.items() if len(r) == 16
        }
        note(step=step, stage=stage, held_out={n: round(float(v), 4) for n, v in values.items()})

    note(size=args.size, parameters=sum(p.size for p in params.values()), first=first, total=total, rows=args.rows, rate=args.rate)
    last, last_at, recent = time.monotonic(), first, []
    for step in range(first, min(total, args.stop_at or total)):
        stage, rate = stage_at(step, counts, args.rate)
        bit = jnp.uint16(PRETRAIN if stage == "pretrain" else CHAT)
        batch = rows.batch(stage, step, args.rows, args.seed)
        params, state, value = train_step(params, state, batch, bit, jnp.float32(rate), size=size, attention=attention, teacher=teacher)
        recent.append(value)  # a device array: nobody waits for it here
        done = step + 1
        if done % 20 == 0 or done == total:
            mean, now = float(jnp.stack(recent).mean()), time.monotonic()
            speed = (done - last_at) * args.rows * (batch.shape[1] - 1) / (now - last)
            note(step=done, stage=stage, loss=mean, rate=rate, tokens_per_second=int(speed), seconds=now - started)
            last, last_at, recent = now, done, []
        if done == total or stage_at(done, counts, args.rate)[0] != stage:
            judge(done, stage, bit)
        if done % args.save_every == 0 or done == total or done == args.stop_at:
            save(checkpoint, done, (params, state))
            export(carry, params, args.size)
    return params


if __name__ == "__main__":
    main()
