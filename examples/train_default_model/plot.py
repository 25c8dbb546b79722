"""Draws the loss curves of the logs beside it.

python plot.py
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).parent


def main() -> None:
    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for color, name in (("tab:blue", "default"), ("tab:orange", "draft")):
        told = [json.loads(line) for line in (HERE / f"log-{name}.jsonl").read_text().splitlines()]
        for stage, style in (("pretrain", "-"), ("chat", "--")):
            points = [(line["step"], line["loss"]) for line in told if line.get("stage") == stage and "loss" in line]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=color, linewidth=1.2, label=f"{name}, {stage}")
    axes.set(xlabel="step of 262,144 tokens", ylabel="nats a learned token", ylim=(0, 5))
    axes.legend(frameon=False)
    figure.savefig(HERE / "loss.png", dpi=80)


if __name__ == "__main__":
    main()
