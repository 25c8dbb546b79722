"""Makes what train.py reads: a tokenizer, and every source as rows of tokens.

    python prepare.py DATA OUT [--sources NAME ...]

A tokenizer that is in OUT already is kept, so that sources can be made again, or in several runs, for a model that has learned them.
A row is 2,049 numbers of 16 bits: the low 14 are the token, bit 14 says that pretraining learns it, bit 15 that the chat stage does, too.
Text runs on from row to row; conversations stay whole, as many to a row as fit.
"""

import argparse
import itertools
from collections.abc import Iterable, Iterator
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from chatml import ANSWER, END, END_OF_TEXT, MARKS, SPECIAL, TEXT, Pieces
from data import SOURCES, attribution
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB = 4096
ROW = 2049
TOKEN, PRETRAIN, CHAT = 0x3FFF, 0x4000, 0x8000
BITS = {0: 0, TEXT: PRETRAIN, ANSWER: PRETRAIN | CHAT}
# Words with the space before them, digits one by one (arithmetic is done on digits), runs of signs, line ends.
SPLIT = r"""'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"""
# Characters of each source that the tokenizer learns from: what is served most is spelled shortest.
TOKENIZER_SHARE = {
    "tiny": 4e6,
    "picture_books": 1e6,
    "books": 4e6,
    "wiki": 3e6,
    "stories_asked": 3e6,
    "chores": 1e6,
    "tools": 2e6,
    "sgd": 5e6,
    "topical": 1e6,
}


def train_tokenizer(data: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokens = [AddedToken(t, special=True, normalized=False) for t in SPECIAL] + [
        AddedToken(t, special=False, normalized=False) for t in MARKS
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(MARKS),
        special_tokens=tokens[: len(SPECIAL)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = itertools.chain.from_iterable(_beginning(data, name, int(size)) for name, size in TOKENIZER_SHARE.items())
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(tokens[len(SPECIAL) :])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A $B", special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))]
    )
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None, token
    return found


def _beginning(data: Path, name: str, size: int) -> Iterator[str]:
    for pieces in SOURCES[name].make(data, False):
        for text, _ in pieces:
            for mark in (*SPECIAL, *MARKS):
                text = text.replace(mark, " ")
            yield text
            size -= len(text)
        if size <= 0:
            return


def encode(tokenizer: Tokenizer, documents: Iterable[Pieces]) -> Iterator[np.ndarray]:
    """Each document as tokens with their bits."""
    for batch in itertools.batched(documents, 500):
        texts = [text for pieces in batch for text, _ in pieces]
        encoded = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        for pieces in batch:
            yield np.concatenate([np.asarray(next(encoded).ids, np.uint16) | np.uint16(BITS[kind]) for _, kind in pieces])


def run_on(documents: Iterable[np.ndarray]) -> np.ndarray:
    """Rows of text without gaps [rows, ROW]. A row's last token is the next row's first, so that each is learned once."""
    tokens = np.concatenate(list(documents))
    count = (len(tokens) - 1) // (ROW - 1)
    return np.stack([tokens[i * (ROW - 1) : i * (ROW - 1) + ROW] for i in range(count)]) if count else tokens[:0].reshape(0, ROW)


def whole(documents: Iterable[np.ndarray], pad: int, open_rows: int = 64) -> np.ndarray:
    """Rows of whole documents [rows, ROW], each put where it leaves the least room; one that is too long is cut."""
    closed: list[list[np.ndarray]] = []
    rows: list[tuple[int, list[np.ndarray]]] = []  # (room, documents)
    for document in documents:
        document = document[:ROW]
        fitting = [i for i, (room, _) in enumerate(rows) if room >= len(document)]
        if fitting:
            best = min(fitting, key=lambda i: rows[i][0])
            room, held = rows[best]
            rows[best] = (room - len(document), [*held, document])
        else:
            rows.append((ROW - len(document), [document]))
            if len(rows) > open_rows:
                closed.append(rows.pop(min(range(len(rows)), key=lambda i: rows[i][0]))[1])
    closed += [held for _, held in rows]
    out = np.full((len(closed), ROW), pad, np.uint16)
    for row, held in zip(out, closed, strict=True):
        joined = np.concatenate(held)
        row[: len(joined)] = joined
    return out


def prepare_source(name: str, data: Path, out: Path) -> str:
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    source, pad = SOURCES[name], token_id(tokenizer, "<|pad|>")
    said = [name]
    for held, folder in ((False, "train"), (True, "held_out")):
        documents = encode(tokenizer, source.make(data, held))
        rows = whole(documents, pad) if source.whole else run_on(documents)
        np.save(out / folder / f"{name}.npy", rows)
        said.append(f"{folder} {len(rows)} rows, {(rows != pad).sum():,} tokens, {(rows >= CHAT).sum():,} learned by the chat stage")
    return ": ".join([said[0], "; ".join(said[1:])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with text/*.jsonl.xz and chat/*.jsonl.xz")
    parser.add_argument("out", type=Path)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    for folder in ("train", "held_out"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    if not (args.out / "tokenizer.json").exists():
        tokenizer = train_tokenizer(args.data)
        assert tokenizer.get_vocab_size() == VOCAB and tokenizer.token_to_id(END) is not None
        tokenizer.save(str(args.out / "tokenizer.json"))
    (args.out / "ATTRIBUTION.md").write_text(attribution(args.data))
    with Pool(args.workers) as pool:
        for line in pool.starmap(prepare_source, [(name, args.data, args.out) for name in args.sources], chunksize=1):
            print(line, flush=True)


if __name__ == "__main__":
    main()
