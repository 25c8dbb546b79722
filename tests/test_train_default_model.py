"""examples/train_default_model: what its generators make is true and held apart, rows say what is learned, training survives a kill."""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import acceptance
import chores
import jax.numpy as jnp
import numpy as np
import pytest
import schemas
import scorecard
import stories
import tools
import train
import words
from chatml import ANSWER, conversation
from model import SIZES, init, logits
from prepare import CHAT, PRETRAIN, ROW, TOKEN, encode, run_on, whole
from tokenizers import Tokenizer

from jaxllm import SamplingParams
from jaxllm.source import default_model
from jaxllm.text import Tokenizer as Served

CODE = Path(__file__).parent.parent / "examples" / "train_default_model"
SMOKE = SIZES["smoke"]


def test_stories_agree_with_what_was_asked_and_leave_no_slot_open():
    for seed in range(400):
        random = Random(seed)
        story = stories.tell(random, hero=random.choice([None, *words.ANIMALS]), thing=random.choice([None, *words.THINGS, *words.FOODS]))
        assert not re.search(r"[{}\[\]|]", story.text), story.text
        assert not re.search(r"(^|\n)[a-z]|[.?!] [a-z]| {2}|\ba [aeio]\w+ (?:named|dog|girl|boy)", story.text), story.text
        named = [story.hero.kind] if story.hero.name is None else [story.hero.kind, story.hero.name]
        assert all(word in story.text for word in [*named, *([story.thing] if story.thing else [])]), (named, story.thing, story.text)
        assert stories.ask(story, random)


def test_every_plot_is_told():
    assert {stories.tell(Random(seed)).plot for seed in range(2000)} == set(stories.plots()) == set(stories.THEMES)


def test_arithmetic_is_right_and_the_held_out_questions_are_never_trained():
    asked: dict[bool, set] = {True: set(), False: set()}
    for held in (True, False):
        for seed in range(2000):
            question, answer = (m["content"] for m in chores.arithmetic(Random(seed), held))
            sign = {"plus": "+", "minus": "-", "times": "*", "x": "*", "+": "+", "-": "-", "*": "*"}
            found = re.search(r"(\d+) (plus|minus|times|[-+*x]) (\d+) (?:=|is) (\d+)", answer)
            assert found and found[1] in question
            a, b, result = int(found[1]), int(found[3]), int(found[4])
            assert {"+": a + b, "-": a - b, "*": a * b}[sign[found[2]]] == result
            asked[held].add((a, sign[found[2]], b))
    assert not asked[True] & asked[False]


def test_worlds_are_answered_from_their_facts():
    for seed in range(300):
        question, answer = (m["content"] for m in chores.world(Random(seed)))
        assert answer.split()[0].removesuffix("'s") in question


def renamed(random: Random):
    return schemas.renamed(*tools.make(random), random)


@pytest.mark.parametrize("make", [tools.make, schemas.make, renamed])
def test_every_made_call_fits_its_schema(make):
    made = 0
    for seed in range(300):
        messages, offered = make(Random(seed))
        for message in messages:
            for call in message.get("tool_calls", []):
                text = "".join(text for text, kind in conversation([message]) if kind == ANSWER)
                assert all(scorecard.judge_call(text, offered, call["function"]).values()), (message, offered)
                made += 1
    assert made > 300


def test_renaming_keeps_what_is_said_and_changes_what_things_are_called():
    changed = 0
    for seed in range(100):
        before, tools_before = tools.make(Random(seed))
        after, tools_after = schemas.renamed(before, tools_before, Random(seed))
        assert [m["content"] for m in after] == [m["content"] for m in before]
        for old, new in zip(before, after, strict=True):
            for c, d in zip(old.get("tool_calls", []), new.get("tool_calls", []), strict=True):
                values, kept = (list(json.loads(x["function"]["arguments"]).values()) for x in (c, d))
                assert all(v in values for v in kept)
        changed += not {t["function"]["name"] for t in tools_before} & {t["function"]["name"] for t in tools_after}
    assert changed > 50
    found = {"old": "2019-03-01", "other": "x"}
    assert json.loads(schemas._rekeyed(json.dumps([found]), {"old": "new"})) == [{"new": "2019-03-01", "other": "x"}]


WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}
DUE = {"name": "weather", "arguments": '{"city": "Rome"}'}


@pytest.mark.parametrize(
    "body, right",
    [
        ('{"name": "weather", "arguments": {"city": "Rome"}}', 6),
        ('{"name": "weather", "arguments": {"city": "Oslo"}}', 5),
        ('{"name": "weather", "arguments": {"city": 7}}', 4),
        ('{"name": "weather", "arguments": {}}', 4),
        ('{"name": "wether", "arguments": {"city": "Rome"}}', 2),
        ('{"name": "weather", "arguments": {"city": "Rome"}', 1),
    ],
)
def test_a_call_is_judged_step_by_step(body, right):
    judged = scorecard.judge_call(f"<tool_call>\n{body}\n</tool_call>", [{"function": WEATHER}], DUE)
    assert sum(judged.values()) == right
    assert not any(scorecard.judge_call("It is sunny.", [{"function": WEATHER}], DUE).values())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(default_model() / "tokenizer.json"))


def test_training_and_serving_write_a_conversation_alike(tokenizer):
    """The pieces that are learned from are, joined, the template's text; and encoded piece by piece, its tokens."""
    served = Served.load(default_model())
    for seed in range(40):
        messages, offered = tools.make(Random(seed))
        pieces = conversation(messages, offered)
        assert "".join(text for text, _ in pieces) == served.render_chat(messages, tools=offered, add_generation_prompt=False)
        (tokens,) = encode(tokenizer, [pieces])
        assert (tokens & TOKEN).tolist() == served.chat(messages, tools=offered, add_generation_prompt=False)


def test_rows_keep_conversations_whole_and_learn_the_answers_alone(tokenizer):
    documents = [conversation(chores.make(Random(seed))) for seed in range(300)]
    encoded = list(encode(tokenizer, documents))
    pad = tokenizer.token_to_id("<|pad|>")
    rows = whole(encoded, pad)
    assert rows.shape[1] == ROW and (rows != pad).sum() == sum(map(len, encoded))
    assert (rows >= CHAT).sum() == sum((d >= CHAT).sum() for d in encoded)
    learned = tokenizer.decode((encoded[0][encoded[0] >= CHAT] & TOKEN).tolist(), skip_special_tokens=True)
    assert learned == "".join(t for t, kind in documents[0] if kind == ANSWER).replace("<|im_end|>", "")
    flat = run_on([np.arange(3 * ROW, dtype=np.uint16)])
    assert flat.shape == (3, ROW) and flat[1, 0] == flat[0, -1]


def test_only_marked_tokens_count():
    params, random = init(SMOKE, 0), np.random.default_rng(0)
    tokens = random.integers(0, SMOKE.vocab, (2, 17)).astype(np.uint16)
    marked = tokens | np.where(random.random(tokens.shape) < 0.4, CHAT | PRETRAIN, PRETRAIN).astype(np.uint16)
    found = float(train.loss(params, jnp.asarray(marked), jnp.uint16(CHAT), SMOKE, "xla"))
    scores = np.asarray(logits(params, jnp.asarray(tokens[:, :-1].astype(np.int32)), SMOKE), np.float64)
    nats = np.log(np.exp(scores).sum(-1)) - np.take_along_axis(scores, tokens[:, 1:, None].astype(int), -1)[..., 0]
    wanted = nats[marked[:, 1:] >= CHAT].mean()
    assert found == pytest.approx(wanted, abs=2e-3)  # the loss computes in bfloat16
    assert abs(nats.mean() - wanted) > 4e-3, "the mask would not be noticed"


def test_with_a_teacher_what_it_thinks_counts_and_not_the_text(monkeypatch):
    monkeypatch.setattr(train, "TEACHER", SMOKE)
    student, teacher = ({n: 5 * p for n, p in init(SMOKE, seed).items()} for seed in (0, 1))  # five times: as sure as a trained one
    tokens = np.random.default_rng(0).integers(0, SMOKE.vocab, (2, 17)).astype(np.uint16) | CHAT
    found = float(train.loss(student, jnp.asarray(tokens), jnp.uint16(CHAT), SMOKE, "xla", train.half(teacher)))
    scores, thought = (
        np.asarray(logits(p, jnp.asarray((tokens & TOKEN)[:, :-1].astype(np.int32)), SMOKE), np.float64) for p in (student, teacher)
    )
    p = np.exp(thought) / np.exp(thought).sum(-1, keepdims=True)
    wanted = (p * (np.log(np.exp(scores).sum(-1, keepdims=True)) - scores)).sum(-1).mean()
    assert found == pytest.approx(wanted, abs=0.05)  # the loss computes in bfloat16
    assert abs(float(train.loss(student, jnp.asarray(tokens), jnp.uint16(CHAT), SMOKE, "xla")) - wanted) > 0.3


def test_acceptance_counts_guesses_up_to_the_first_refusal_and_samples_as_served():
    kept = acceptance.guesses_kept(np.array([1, 1, 0.5, 0, 1, 1, 1, 1, 1]))
    np.testing.assert_allclose(kept, [2.5, 1.5, 0.5, 0, 4, 4, 3, 2, 1])
    p = acceptance.sampled_from(np.log([[0.5, 0.3, 0.15, 0.05]]), SamplingParams(temperature=1.0, top_p=0.75))
    np.testing.assert_allclose(p, [[0.625, 0.375, 0, 0]])


def test_the_rate_rises_stays_and_falls():
    stages, rates = zip(*(train.stage_at(step, {"pretrain": 200, "chat": 100, "finish": 200}, 1.0) for step in range(500)), strict=True)
    assert stages == ("pretrain",) * 200 + ("chat",) * 100 + ("finish",) * 200
    assert rates[0] == 0.01 and rates[100:200] == (1.0,) * 100 and rates[250] == 0.5 and 0 < rates[299] < 0.02
    assert rates[300] == 0.01 and max(rates[300:]) == pytest.approx(0.505) and rates[400] == 0.5 and 0 < rates[499] < 0.01


def arguments(prepared: Path, out: Path) -> argparse.Namespace:
    options = dict(
        size="smoke",
        pretrain=40,
        chat=20,
        finish=0,
        teacher=None,
        rows=2,
        rate=4e-3,
        seed=0,
        save_every=5,
        stop_at=None,
        carry=None,
        start=None,
    )
    return argparse.Namespace(prepared=prepared, out=out, **options)


def test_training_learns_and_goes_on_after_a_kill_as_if_nothing_had_been(tmp_path, tokenizer, capsys):
    for folder in ("train", "held_out"):
        (tmp_path / folder).mkdir()
        rows = whole(encode(tokenizer, (conversation(chores.make(Random(seed))) for seed in range(400))), 0)
        np.save(tmp_path / folder / "chores.npy", rows[:, :129])
    whole_run = train.train(arguments(tmp_path, tmp_path / "straight"))
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    losses = [line["loss"] for line in told if "loss" in line]
    assert len(losses) == 3 and losses[1] < losses[0] - 1

    out = tmp_path / "killed"
    flags = {"--size": "smoke", "--pretrain": "40", "--chat": "20", "--rows": "2", "--rate": "4e-3", "--save-every": "5"}
    command = [sys.executable, str(CODE / "train.py"), str(tmp_path), str(out), *(word for flag in flags.items() for word in flag)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        for _ in range(600):
            if (out / "checkpoint-smoke.npz").exists() or process.poll() is not None:
                break
            time.sleep(0.05)
        process.kill()
    assert process.returncode != 0, "it ended before it was killed"
    resumed = train.train(arguments(tmp_path, out))
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert 5 <= first["first"] < 60
    for name, value in whole_run.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(resumed[name]), err_msg=name)
    exported = train.exported(out, "smoke")
    assert exported.keys() == whole_run.keys()
    np.testing.assert_allclose(exported["model.norm.weight"], whole_run["model.norm.weight"], rtol=4e-3)
