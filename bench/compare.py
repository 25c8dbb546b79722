"""Puts results side by side from bench/results alone: ours, vLLM's figures, the hardware's limit; as tables and as pictures.

jaxllm bench compare                     # Markdown tables on the terminal
jaxllm bench compare --readme README.md  # writes them between the file's two markers
jaxllm bench compare --plots docs/plots  # PNG files (needs the bench extra)
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import record

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
# Row names in the order of the tables: what they mean, and whether more is better.
NAMES = {
    "decode_step_ms": ("decode step", False),
    "prefill_tok_s": ("prefill", True),
    "mix_s": ("MIX, greedy", False),
    "mix_sampled_s": ("MIX, sampled", False),
    "long_ttft_s": ("a long prompt", False),
    "long_decode_step_ms": ("decode step behind it", False),
    "serve_tok_s": ("HTTP: output", True),
    "serve_ttft_mean_ms": ("HTTP: mean TTFT", False),
    "serve_itl_p99_ms": ("HTTP: p99 ITL", False),
    "clients_tok_s": ("without HTTP: output", True),
    "clients_ttft_mean_ms": ("without HTTP: mean TTFT", False),
    "clients_itl_p99_ms": ("without HTTP: p99 ITL", False),
    "start_cold_s": ("start, nothing cached", False),
    "start_warm_s": ("start, cached", False),
    "kernel_decode_TBps": ("decode attention kernel", True),
    "kernel_prefill_TFs": ("prefill attention kernel", True),
    "kernel_write_kv_us": ("KV write kernel", False),
    "linear_us": ("a linear layer's product", False),
    "load_GBps": ("loading weights", True),
    "api_tok_s": ("HTTP: tokens made up", True),
    "streamed_step_ms": ("decode step, streamed", False),
    "unstreamed_step_ms": ("decode step, not streamed", False),
    "streams_cost": ("what streams cost a step", False),
    "structured_free_ms": ("decode step of a free row", False),
    "structured_form_ms": ("decode step of a row with a form", False),
    "structured_loss": ("what forms cost a free row", False),
    "gpu_busy": ("GPU busy", True),
    "kernels_per_layer": ("kernels a layer", False),
}
# What was measured, in the order it is told. A dtype or tp that everybody has goes unsaid.
_WHERE = (
    *("batch", "heads", "kv_heads", "head_dim", "page", "clients", "rate", "context", "input", "output", "lengths", "workload"),
    *("load_format", "api_servers", "forms", "product", "by", "load"),
)
_WORDS = {
    "clients": "{} clients",
    "batch": "batch {}",
    "context": "context {}",
    "input": "{} in",
    "output": "{} out",
    "rate": "{} requests/s",
}
_WORDS |= {"heads": "{} heads", "kv_heads": "{} KV heads", "head_dim": "of {}", "page": "page {}", "lengths": "{}", "workload": "{}"}
_WORDS |= {"load_format": "{} weights", "api_servers": "{} API processes", "forms": "{} rows with forms"}
_WORDS |= {"product": "{}", "by": "{}", "load": "{}"}


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by device, each with the date it was measured. Raises ValueError for a file that is no result file."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            kept = json.loads(path.read_text())
            rows = [{"date": kept["date"], **row} for row in kept["rows"]]
            found.setdefault(kept["device"], []).extend(rows)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a result file of this bench: {error!r}") from error
    return found


def where(row: dict[str, Any]) -> str:
    """What a row was measured on, in words."""
    said = [_WORDS[key].format(row[key]) for key in _WHERE if row.get(key) is not None and row[key] != "fixed"]
    if row.get("tp", 1) != 1:
        said.append(f"{row['tp']} GPUs")
    if row.get("dtype", "bfloat16") != "bfloat16":
        said.append(row["dtype"])
    return ", ".join(said)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: more than 100% of vLLM's speed is faster than vLLM; the limit is what the hardware allows."""
    lines = ["| model | what | on | jaxllm | vLLM | of vLLM's speed | limit | of the limit |", "|---|---|---|---|---|---|---|---|"]
    for row in sorted(rows, key=_order):
        title, more = NAMES.get(row["name"], (row["name"], True))
        others = [cell for key in ("anchor", "limit") for cell in _against(row, key, more)]
        cells = [row.get("model", ""), title, where(row), f"{number(row['value'])} {row['unit']}", *others]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _against(row: dict[str, Any], key: str, more: bool) -> tuple[str, str]:
    """Another figure, and our speed as a share of it."""
    if key not in row:
        return "", ""
    share = row["value"] / row[key] if more else row[key] / row["value"]
    return number(row[key]), f"{share:.0%}"


def number(value: float) -> str:
    """Four digits, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _order(row: dict[str, Any]) -> tuple:
    names = list(NAMES)
    place = names.index(row["name"]) if row["name"] in names else len(names)
    sizes = [(0, row[key], "") if isinstance(row.get(key), int | float) else (1, 0, str(row.get(key, ""))) for key in _WHERE]
    return row.get("model", ""), place, row["name"], row.get("tp", 1), sizes


def section(found: dict[str, list[dict[str, Any]]]) -> str:
    """All tables, a device each, with the days they were measured on."""
    if not found:
        return "There are no results yet."
    parts = []
    for device, rows in sorted(found.items()):
        days = sorted({row["date"] for row in rows})
        when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        parts.append(f"{device}, measured {when}; vLLM 0.24.0 on the same kind of machine where a figure is given:\n\n{table(rows)}")
    return "\n\n".join(parts)


def written(text: str, new: str) -> str:
    """`text` with what stands between the markers replaced. Raises ValueError if the markers are not there, once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the file needs one line {BEGIN} and, after it, one line {END}")
    return text[: text.index(BEGIN) + len(BEGIN)] + f"\n{new}\n" + text[text.index(END) :]


def draw(found: dict[str, list[dict[str, Any]]], folder: Path) -> list[Path]:
    """A picture of the decode steps, and one of each other measurement, for every device; the files."""
    from bench import plots

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for device, rows in sorted(found.items()):
        for name, (title, _) in NAMES.items():
            own = sorted((row for row in rows if row["name"] == name), key=_order)
            if not own:
                continue
            path = folder / f"{name}-{record.slug(device)}.png"
            if name == "decode_step_ms":
                plots.decode([row for row in own if row.get("tp", 1) == 1], path, device)
            else:
                plots.bars(own, [f"{row.get('model', '')}\n{where(row)}".strip() for row in own], path, f"{title}, {device}")
            made.append(path)
    return made


def main(argv: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(prog="jaxllm bench compare", description="Results beside vLLM's figures and the hardware's limits.")
    made.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the result files")
    made.add_argument("--readme", type=Path, metavar="FILE", help=f"write the tables between {BEGIN} and {END}")
    made.add_argument("--plots", type=Path, metavar="FOLDER", help="draw PNG files")
    args = made.parse_args(sys.argv[1:] if argv is None else argv)
    try:
        found = read(args.results)
        if args.readme:  # whole models only: who reads a README asks how fast those are
            models = {device: [row for row in rows if "model" in row and "product" not in row] for device, rows in found.items()}
            models = {device: rows for device, rows in models.items() if rows}
            args.readme.write_text(written(args.readme.read_text(), section(models)))
        else:
            print(section(found))
    except (ValueError, OSError) as error:
        raise SystemExit(f"jaxllm bench compare: {error}") from error
    for path in draw(found, args.plots) if args.plots else ():
        print(path)


if __name__ == "__main__":
    main()
