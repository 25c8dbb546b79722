"""Makes the folder that ships from what train.py exported: one file of weights, and everything Hugging Face's loaders look for.

    python ship.py PREPARED RUN FOLDER --size default --card card.md scorecard.md

With --card the folder gets the model card, made of a card and what was measured, and the attribution.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

from chatml import END, END_OF_TEXT
from model import SIZES
from prepare import token_id
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

HERE = Path(__file__).parent


def write(folder: Path, name: str, value: dict) -> None:
    (folder / name).write_text(json.dumps(value, indent=2) + "\n")


def ship(prepared: Path, run: Path, folder: Path, size: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value for path in sorted(run.glob(f"{size}-*.safetensors")) for name, value in load_file(path).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = Tokenizer.from_file(str(prepared / "tokenizer.json"))
    end_of_text, end, pad = (token_id(tokenizer, t) for t in (END_OF_TEXT, END, "<|pad|>"))
    write(folder, "config.json", SIZES[size].hf_config(end_of_text, [end, end_of_text], pad))
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    write(
        folder, "generation_config.json", {"bos_token_id": end_of_text, "eos_token_id": [end, end_of_text], "pad_token_id": pad, **sampling}
    )
    shutil.copy(prepared / "tokenizer.json", folder)
    shutil.copy(HERE / "chat_template.jinja", folder)
    special = {"bos_token": END_OF_TEXT, "eos_token": END, "pad_token": "<|pad|>"}
    write(
        folder,
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": SIZES[size].context,
            "clean_up_tokenization_spaces": False,
            **special,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="default")
    parser.add_argument("--card", type=Path, nargs=2, metavar=("CARD", "MEASURED"), help="what the model card is made of")
    args = parser.parse_args()
    ship(args.prepared, args.run, args.folder, args.size)
    if args.card:
        card, measured = (path.read_text() for path in args.card)
        (args.folder / "README.md").write_text(card + re.sub(r"^#", "##", measured, flags=re.MULTILINE))
        shutil.copy(args.prepared / "ATTRIBUTION.md", args.folder)


if __name__ == "__main__":
    main()
