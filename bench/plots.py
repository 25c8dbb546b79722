"""PNG pictures of results. matplotlib comes with the `bench` extra and is imported only when something is drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.answers import Answer

OURS, VLLM, LIMIT = "tab:blue", "tab:orange", "tab:gray"


def figure(columns: int, title: str) -> tuple[Any, Sequence[Any]]:
    """A figure of `columns` axes side by side. Raises SystemExit, in a sentence, where matplotlib is absent."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit('plots need matplotlib: pip install "jaxllm[bench]"') from error
    made = Figure(figsize=(4.5 * columns, 3.6), layout="constrained")
    made.suptitle(title)
    return made, made.subplots(1, columns, squeeze=False)[0]


def run(answers: Sequence[Answer], path: Path, title: str) -> None:
    """One load test: how TTFT, ITL and end-to-end latency are distributed, and tokens a second over time."""
    good = [answer for answer in answers if answer.error is None]
    if not good:
        raise SystemExit("nothing to draw: no request succeeded")
    made, axes = figure(4, title)
    samples = {
        "TTFT (ms)": [answer.ttft for answer in good],
        "ITL (ms)": [gap for answer in good for gap in answer.itls] or [0.0],
        "end-to-end latency (ms)": [answer.e2el for answer in good],
    }
    for ax, (name, seconds) in zip(axes, samples.items(), strict=False):
        ax.plot(1e3 * np.sort(seconds), np.linspace(0, 100, len(seconds)), color=OURS)
        ax.set(xlabel=name, ylabel="% at most so much", ylim=(0, 100))
        ax.grid(alpha=0.3)
    times = np.array([t for answer in good for t in answer.times]) - min(answer.sent for answer in good)
    width = max(times.max() / 60, 1e-3)
    counts, edges = np.histogram(times, bins=np.arange(0, times.max() + 2 * width, width))
    axes[3].plot(edges[:-1] + width / 2, counts / width, color=OURS)
    axes[3].set(xlabel="time (s)", ylabel="output tok/s", ylim=(0, None))
    axes[3].grid(alpha=0.3)
    made.savefig(path)


def decode(rows: Sequence[dict[str, Any]], path: Path, device: str) -> None:
    """Decode steps against batch size, a picture a model: measured, vLLM's, and the device's limit."""
    models = sorted({row["model"] for row in rows})
    made, axes = figure(len(models), f"decode step, {device}")
    for ax, model in zip(axes, models, strict=True):
        own = sorted((row for row in rows if row["model"] == model), key=lambda row: row["batch"])
        for key, name, color in (("value", "jaxllm", OURS), ("anchor", "vLLM", VLLM), ("limit", "limit", LIMIT)):
            points = [(row["batch"], row[key]) for row in own if key in row]
            if points:
                ax.plot(*zip(*points, strict=True), marker="o", linestyle="--" if key == "limit" else "-", color=color, label=name)
        ax.set(title=model, xlabel="batch", ylabel="ms a step", xscale="log", yscale="log")
        ax.grid(alpha=0.3, which="both")
        ax.legend()
    made.savefig(path)


def bars(rows: Sequence[dict[str, Any]], labels: Sequence[str], path: Path, title: str) -> None:
    """Rows of one unit as bars side by side, vLLM's beside ours, the limit as a line over both."""
    made, (ax,) = figure(1, title)
    made.set_size_inches(max(4.5, 1.2 * len(rows) + 2), 4)
    for i, row in enumerate(rows):
        ax.bar(i - 0.2, row["value"], 0.4, color=OURS, label="jaxllm" if i == 0 else None)
        if "anchor" in row:
            ax.bar(i + 0.2, row["anchor"], 0.4, color=VLLM, label=None if any("anchor" in r for r in rows[:i]) else "vLLM")
        if "limit" in row:
            label = None if any("limit" in r for r in rows[:i]) else "limit"
            ax.hlines(row["limit"], i - 0.4, i + 0.4, color=LIMIT, linestyle="--", label=label)
    ax.set_xticks(range(len(rows)), labels, rotation=30, ha="right")
    ax.set(ylabel=rows[0]["unit"])
    ax.grid(alpha=0.3, axis="y")
    ax.legend()
    made.savefig(path)


def kernels(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """The kernel bench: decode's read rate over the bytes it reads and prefill's rate over its tokens; another's figures as crosses."""
    made, axes = figure(2, title)
    kinds = (("kernel_decode_TBps", "MB", "MB of keys and values"), ("kernel_prefill_TFs", "tokens", "prompt tokens"))
    for ax, (name, across, label) in zip(axes, kinds, strict=True):
        drawn = [row for row in rows if row["name"] == name]
        for line in sorted({_line(row) for row in drawn}):
            points = sorted((row[across], row["value"]) for row in drawn if _line(row) == line)
            ax.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=0.8, label=line)
        anchored = [row for row in drawn if row.get("anchor") is not None]
        ax.plot([row[across] for row in anchored], [row["anchor"] for row in anchored], "x", color=VLLM, label="FlashAttention-3")
        for limit in {row["limit"] for row in drawn if row.get("limit") is not None}:
            ax.axhline(limit, color=LIMIT, linestyle="--", label="measured limit")
        ax.set(xlabel=label, ylabel=drawn[0]["unit"] if drawn else "", xscale="log", ylim=(0, None))
        ax.grid(alpha=0.3)
        if drawn:
            ax.legend(fontsize=6)
    made.savefig(path, dpi=120)


def _line(row: dict[str, Any]) -> str:
    line = f"{row['heads']}/{row['kv_heads']} heads of {row['head_dim']}, page {row['page']}, {row['dtype']}, {row['implementation']}"
    return line + (f", {row['load']}" if "load" in row else "")
