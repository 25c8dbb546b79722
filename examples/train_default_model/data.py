"""The sources: real text and conversations read from a data folder, and what our generators make, each as training and held-out documents.

A document is pieces (chatml.py). Every real source names its licence, and `attribution` lists them; books that are public domain in
the United States alone are left out.
"""

import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import chores
import schemas
import stories
import tools
import words
from chatml import Pieces, conversation, plain

US_ONLY = ("a-a-milne", "hugh-lofting")  # not free everywhere yet
SIMPLE = ("global-asp",)  # picture books: short sentences


@dataclass(frozen=True)
class Source:
    make: Callable[[Path, bool], Iterator[Pieces]]  # (data folder, held out?)
    whole: bool  # a document stays in one row (conversations), or runs on into the next (text)


def read(folder: Path, name: str) -> list[dict]:
    with lzma.open(folder / f"{name}.jsonl.xz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def held_out(text: str, share: int = 40) -> bool:
    """One document in `share`, by its beginning, so that a copy of a story never sits on both sides."""
    return zlib.crc32(text[:60].encode()) % share == 0


def clean(text: str) -> str:
    for curly, straight in (("\u201c", '"'), ("\u201d", '"'), ("\u2018", "'"), ("\u2019", "'"), ("\u2013", "-"), ("\u2014", " - ")):
        text = text.replace(curly, straight)
    text = re.sub(r"[ \t\u00a0]+", " ", text)
    return re.sub(r" *\n\s*", "\n\n", text).strip()


# --- natural text


def _tiny(folder: Path, held: bool) -> list[str]:
    seen, kept = set(), []
    for row in read(folder, "text/tinystories_slices"):
        text = clean(row["text"].replace("<|endoftext|>", ""))
        key = re.sub(r"\W", "", text[:100]).lower()
        whole = text[-1:] in '.!?"' and len(text) > 150 and text[:1].isupper()
        if whole and key not in seen and held_out(text) == held:
            kept.append(text)
        seen.add(key)
    return kept


def renamed(text: str, random: Random) -> str:
    """The same story about somebody else: every name we know becomes another one of its kind."""
    names = set(re.findall(r"\b[A-Z][a-z]+\b", text))
    change = {n: random.choice(pool) for pool in (words.GIRLS, words.BOYS) for n in sorted(names & set(pool))}
    if len(set(change.values())) < len(change):
        return text
    return re.sub(r"\b[A-Z][a-z]+\b", lambda m: change.get(m[0], m[0]), text)


def tiny_text(folder: Path, held: bool) -> Iterator[Pieces]:
    random = Random(1)
    for _ in range(1 if held else 4):
        for text in _tiny(folder, held):
            yield plain(text if held else renamed(text, random))


def tiny_asked(folder: Path, held: bool) -> Iterator[Pieces]:
    """Real stories with a request for what they are about."""
    texts, random = _tiny(folder, held), Random(2)
    seen_in = Counter(w for text in texts for w in set(_nouns(text)))
    for _ in range(1 if held else 6):
        for text in texts:
            text = text if held else renamed(text, random)
            yield conversation(chores.chat(_request(text, seen_in, random), text))


_NOT_NOUNS = set(
    """little big small best new same other first next day time one very old good great bad happy sad lot way end rest long whole
way two three few most more many mom dad more red blue green kind nice special young loud soft own story moral friend friends people idea
morning night house home family fun""".split()
)


def _nouns(text: str) -> list[str]:
    return [w for w in re.findall(r"\b(?:a|an|the|his|her|a \w+|the \w+) ([a-z]{3,})\b", text) if w not in _NOT_NOUNS]


def _request(text: str, seen_in: Counter, random: Random) -> str:
    counts = Counter(_nouns(text))
    salient = sorted((n for n, c in counts.items() if c > 1), key=lambda n: -counts[n] / (20 + seen_in[n]))[:3]
    hero = re.search(r"\b(?:was|lived|is|were) (an? (?:\w+ ){0,3}\w+ (?:named|called) [A-Z]\w+)", text[:300])
    named = [hero[1]] if hero else []
    about = [stories.article(n) + " " + n for n in random.sample(salient, min(len(salient), random.choice([1, 2])))]
    if named and (not about or random.random() < 0.6):
        about = named + about[:1]
    if not about:
        return random.choice(stories.ASKS_ANYTHING)
    return random.choice(stories.ASKS).format(" and ".join(about))


def _books(folder: Path, held: bool, simple: bool) -> Iterator[Pieces]:
    for row in read(folder, "text/childrens_stories"):
        if not any(name in row["source"] for name in US_ONLY) and row["source"].startswith(SIMPLE) == simple:
            text = clean(row["text"])
            if held_out(text) == held:
                yield plain(text)


def wiki(folder: Path, held: bool) -> Iterator[Pieces]:
    for row in read(folder, "text/wiki_simple_filtered"):
        if held_out(row["text"], 200) == held:
            yield plain(f"{row['title']}\n\n{clean(row['text'])}")


def news(folder: Path, held: bool) -> Iterator[Pieces]:
    for row in read(folder, "text/onestopenglish"):
        if held_out(row["text"]) == held:
            yield plain(clean(row["text"]))


# --- natural conversations


def sgd(folder: Path, held: bool) -> Iterator[Pieces]:
    """Tool dialogues. In training half of them spell the names of functions and parameters another way, so that names are read."""
    random = Random(3)
    for row in read(folder, "chat/sgd_tool_chat"):
        if (row["split"] == "test") == held:
            yield conversation(*((row["messages"], row["tools"]) if held else schemas.respelled(row["messages"], row["tools"], random)))


def renamed_sgd(folder: Path, held: bool) -> Iterator[Pieces]:
    """The same dialogues for training, each twice, under names that only the schema knows (schemas.py)."""
    random = Random(4)
    for _ in range(0 if held else 2):
        for row in read(folder, "chat/sgd_tool_chat"):
            functions = [t["function"]["name"] for t in row["tools"]]
            if row["split"] != "test" and len(set(functions)) == len(functions):
                yield conversation(*schemas.renamed(row["messages"], row["tools"], random))


def _dialogues(name: str) -> Callable[[Path, bool], Iterator[Pieces]]:
    def make(folder: Path, held: bool) -> Iterator[Pieces]:
        for row in read(folder, f"chat/{name}"):
            messages = [{"role": m["role"], "content": clean(m["content"])} for m in row["messages"]]
            if (row["split"] == "test" if "split" in row else held_out(messages[0]["content"])) == held:
                yield conversation(messages)

    return make


def fairytales(folder: Path, held: bool) -> Iterator[Pieces]:
    """Questions about a passage: the first comes with it, the others follow."""
    sections: dict[str, list[dict]] = {}
    for row in read(folder, "chat/fairytaleqa_qa"):
        sections.setdefault(clean(row["context"]), []).append(row)
    for context, rows in sections.items():
        if held_out(rows[0]["title"]) == held and len(context) < 5000:
            messages = [m for row in rows for m in chores.chat(row["question"].strip(), _sentence(row["answer"]))]
            messages[0]["content"] = f"{context}\n\n{messages[0]['content']}"
            yield conversation(messages)


def _sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text[-1:] in ".!?" else ".")


# --- what our generators make: (how many documents to train on, to hold out)


def _made(make: Callable[[Random], Pieces], seed: int, count: int) -> Callable[[Path, bool], Iterator[Pieces]]:
    def generate(folder: Path, held: bool) -> Iterator[Pieces]:
        random = Random(seed + held)
        for _ in range(200 if held else count):
            yield make(random)

    return generate


def _asked(random: Random) -> Pieces:
    messages: list[dict] = []
    for _ in range(random.choice([1, 1, 1, 2])):
        if random.random() < 0.1:
            messages += chores.talk(random)
        story = stories.tell(random, **_favourites(random))
        messages += chores.chat(stories.ask(story, random), story.text)
    return conversation(messages)


def _favourites(random: Random) -> dict:
    """Now and then a hero or a thing by its kind alone, evenly, so that each is asked for often."""
    hero = random.choice([*words.ANIMALS, *words.PEOPLE]) if random.random() < 0.5 else None
    thing = random.choice([*words.THINGS, *words.LIGHT, *words.FOODS]) if random.random() < 0.5 else None
    return {"hero": hero, "thing": thing}


SOURCES = {
    "tiny": Source(tiny_text, False),
    "tiny_asked": Source(tiny_asked, True),
    "picture_books": Source(lambda folder, held: _books(folder, held, True), False),
    "books": Source(lambda folder, held: _books(folder, held, False), False),
    "wiki": Source(wiki, False),
    "news": Source(news, False),
    "stories": Source(_made(lambda random: plain(stories.tell(random).text), 10, 40_000), False),
    "stories_asked": Source(_made(_asked, 20, 60_000), True),
    "chores": Source(_made(lambda random: conversation(chores.make(random)), 30, 200_000), True),
    "tools": Source(_made(lambda random: conversation(*tools.make(random)), 40, 40_000), True),
    "made_up": Source(_made(lambda random: conversation(*schemas.make(random)), 50, 60_000), True),
    "sgd": Source(sgd, True),
    "sgd_renamed": Source(renamed_sgd, True),
    "taskmaster": Source(_dialogues("taskmaster4_chat"), True),
    "topical": Source(_dialogues("topical_chat"), True),
    "gsm8k": Source(_dialogues("gsm8k_chat"), True),
    "fairytales": Source(fairytales, True),
}
FILES = """text/tinystories_slices text/childrens_stories text/wiki_simple_filtered text/onestopenglish chat/sgd_tool_chat
chat/taskmaster4_chat chat/topical_chat chat/gsm8k_chat chat/fairytaleqa_qa""".split()


def attribution(folder: Path) -> str:
    """Every source with its licence and how much of it was used, as Markdown."""
    lines = ["# Attribution", "", "What the default model was trained on, beside what the generators here make.", ""]
    lines += ["| source | licence | documents |", "|---|---|---|"]
    for name in FILES:
        found = Counter((row["source"], row["license"]) for row in read(folder, name))
        kept = {k: n for k, n in found.items() if not any(left in k[0] for left in US_ONLY)}
        lines += [f"| {source} | {licence} | {n} |" for (source, licence), n in sorted(kept.items())]
    return "\n".join(lines) + "\n"
