"""Draws the loss curves of the logs beside it.

python plot.py
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).parent
STYLES = {"pretrain": "-", "chat": "--", "finish": ":"}


def main() -> None:
    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for color, name in (("tab:blue", "default"), ("tab:orange", "draft")):
        found: dict[str, list] = {}
        before = seen = rows = 0
        for line in map(json.loads, (HERE / f"log-{name}.jsonl").read_text().splitlines()):
            if line.get("first") == 0:  # a run that begins anew goes on where the one before it ended
                before, rows = seen, line["rows"]
            if "loss" in line:
                seen = before + line["step"] * rows * 2048 / 1e6
                found.setdefault(line["stage"], []).append((seen, line["loss"]))
        for stage, points in found.items():
            axes.plot(*zip(*points, strict=True), STYLES[stage], color=color, linewidth=1.2, label=f"{name}, {stage}")
    axes.set(xlabel="million tokens", ylabel="nats a learned token", ylim=(0, 5))
    axes.legend(frameon=False)
    figure.savefig(HERE / "loss.png", dpi=80)


if __name__ == "__main__":
    main()
