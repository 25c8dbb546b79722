"""jaxllm/text.py and converters/tokenizer.py, on tiny tokenizers trained here: byte-level, sentencepiece, vocab with merges."""

import codecs
import io
import json
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from converters.tokenizer import byte_fallback_bpe
from jaxllm.request import ConfigError, RequestError, SamplingParams
from jaxllm.text import Detokenizer, Tokenizer

CORPUS = [
    "Once upon a time there was a little girl named Lily. She loved to play outside in the park.",
    "The quick brown fox jumps over the lazy dog, and the dog said: what a   wonderful day!",
    "naïve café Übung straße, 日本語 を 話す, привет мир, ελληνικά",
    "def f(x):\n    return x + 1\n\n\tprint(f(41))",
]
TEXTS = [*CORPUS, "", " ", "  two  spaces ", "\n\n\t", "🎉👩‍👩‍👧 emoji", "x" * 50, " " * 13, "中文字符", "a\x00b", "€½™"]


def train_byte_level(folder: Path) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.save(str(folder / "tokenizer.json"))
    return backend


def train_sentencepiece(folder: Path, **options) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    settings = {"model_type": "bpe", "vocab_size": 420, "byte_fallback": True, "normalization_rule_name": "identity"}
    settings |= {"remove_extra_whitespaces": False, "character_coverage": 0.98, "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model, **settings)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write(folder: Path, **files) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One folder of each kind."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("byte_level", "sentencepiece", "merges")}
    backend = train_byte_level(made["byte_level"])
    write(made["byte_level"], tokenizer_config={"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True})
    backend.model.save(str(made["merges"]))
    write(made["merges"], config={"model_type": "opt"})
    train_sentencepiece(made["sentencepiece"])
    return made


@pytest.fixture(scope="module")
def tokenizers(folders) -> dict[str, Tokenizer]:
    return {name: Tokenizer.load(folder) for name, folder in folders.items()}


KINDS = ("byte_level", "sentencepiece", "merges")


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text == tokenizer._backend.decode(ids)
        assert (tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)) == tuple(ids)
        assert max(ids) < tokenizer.vocab_size
    assert tokenizer.special_tokens["eos_token"] == "</s>"
    assert tokenizer.decode([tokenizer.eos_token_id]) == ""
    assert tokenizer.decode([tokenizer.eos_token_id], skip_special_tokens=False) == "</s>"
    assert tokenizer.is_special(tokenizer.eos_token_id) and not tokenizer.is_special(tokenizer.vocab_size - 1)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40) | st.lists(st.sampled_from([" ", "  ", "a", "e", "th", "日", "é", "\n", "🎉"]), max_size=40).map("".join))
def test_a_lone_tokenizer_model_splits_as_sentencepiece_does(folders, tokenizers, text):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folders["sentencepiece"] / "tokenizer.model"))
    if text and not any(special in text for special in ("<s>", "</s>", "<unk>")):
        assert tokenizers["sentencepiece"].encode(text)[1:] == processor.encode(text)


@pytest.mark.parametrize("options", [{"add_dummy_prefix": False}, {"user_defined_symbols": ["[go]"]}], ids=str)
def test_sentencepiece_settings(tmp_path, options):
    processor = train_sentencepiece(tmp_path, control_symbols=["[INST]"], **options)
    tokenizer = Tokenizer.load(write(tmp_path, tokenizer_config={"add_bos_token": False}))
    for text in filter(None, ["a  b ", " [go] there", *TEXTS]):
        if "[go]" in text and "user_defined_symbols" in options:
            continue  # there the space in front comes again after the symbol (legacy); sentencepiece adds it once
        assert tokenizer.encode(text) == processor.encode(text)
    assert tokenizer.encode("[INST]", add_special_tokens=False) == [processor.piece_to_id("[INST]")]


@pytest.mark.parametrize("lacking", [[], [15]], ids=["Llama 2", "Mistral"])
def test_runs_of_spaces(lacking):
    """Real vocabularies give pieces of spaces one score: sentencepiece then takes the pair furthest left, whatever it makes."""
    sizes = [size for size in (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11, 15, 1) if size not in lacking]
    pieces = ["<unk>", *("▁" * size for size in sizes)]
    backend = byte_fallback_bpe(pieces, [None] + [-1e9] * len(sizes), unk="<unk>", prefix_space=False)
    for length in range(1, 150):
        run = [1] * length
        while pairs := [at for at, (a, b) in enumerate(pairwise(run)) if a + b in sizes]:
            run[pairs[0] : pairs[0] + 2] = [sum(run[pairs[0] : pairs[0] + 2])]
        assert [len(token) for token in backend.encode(" " * length).tokens] == run


def test_space_in_front_after_special_tokens(folders, tmp_path):
    """Llama 2 was trained with one ("legacy"); tokenizers that say otherwise have it only at the beginning."""
    (tmp_path / "tokenizer.model").write_bytes((folders["sentencepiece"] / "tokenizer.model").read_bytes())
    shown = {}
    for legacy in (True, False):
        tokenizer = Tokenizer.load(write(tmp_path, tokenizer_config={"legacy": legacy}))
        shown[legacy] = tokenizer.decode(tokenizer.encode("a</s>b"), skip_special_tokens=False)
    assert shown == {True: "<s> a</s> b", False: "<s> a</s>b"}


def test_refused_folders(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no tokenizer that can be read: it needs tokenizer\.json, or"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xff not one")
    with pytest.raises(ConfigError, match="cannot be read as a sentencepiece model"):
        Tokenizer.load(tmp_path)
    train_sentencepiece(tmp_path, model_type="unigram", vocab_size=320)
    with pytest.raises(ConfigError, match="is a UNIGRAM sentencepiece model, but only BPE is understood"):
        Tokenizer.load(tmp_path)
    train_sentencepiece(tmp_path, remove_extra_whitespaces=True)
    with pytest.raises(ConfigError, match=r"changes text before splitting it \(identity\)"):
        Tokenizer.load(tmp_path)
    train_sentencepiece(tmp_path, normalization_rule_name="nmt_nfkc")
    with pytest.raises(ConfigError, match=r"changes text before splitting it \(nmt_nfkc\), which is not understood"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read as a tokenizer"):
        Tokenizer.load(tmp_path)
    backend = Backend(models.WordLevel({"a": 0}, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="decodes with WordPiece, but the decoders understood are ByteLevel"):
        Tokenizer.load(tmp_path)


def test_settings_decide_the_ends(folders, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folders["byte_level"] / "tokenizer.json").read_bytes())
    ends = {"bos_token": "<s>", "eos_token": "</s>"}

    def load(**settings) -> Tokenizer:
        return Tokenizer.load(write(tmp_path, tokenizer_config=ends | settings))

    assert load().encode("") == []
    assert load(add_bos_token=True, add_eos_token=True).encode("") == [0, 1]
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.enable_truncation(3)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load().encode("")[:1] == [0] and len(load().encode(CORPUS[0])) > 3
    assert load(add_bos_token=False).encode("") == []
    listed = {"content": "<|end|>", "special": True}
    more = load(added_tokens_decoder={"400": listed}, eos_token="<|end|>")
    assert more.encode("a<|end|>")[-1] == 400 == more.eos_token_id == more.vocab_size - 1 and more.decode([400]) == ""
    with pytest.raises(ConfigError, match=r"gives '<\|end\|>' the id 900, but the tokenizer gives it 400"):
        load(added_tokens_decoder={"900": listed})
    with pytest.raises(ConfigError, match="is not JSON"):
        (tmp_path / "tokenizer_config.json").write_text("{")
        Tokenizer.load(tmp_path)


def test_ids_from_config_json(folders, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folders["byte_level"] / "tokenizer.json").read_bytes())
    tokenizer = Tokenizer.load(write(tmp_path, config={"bos_token_id": 0, "eos_token_id": [1, 0]}))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_single_tokens(tokenizers):
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode("🎉", add_special_tokens=False)
    assert len(ids) == 4 and b"".join(map(tokenizer.token_bytes, ids)) == "🎉".encode()
    assert tokenizer.token_text(ids[0]) == "�" and tokenizer.token_text(0) == "<s>"
    assert tokenizer.token_bytes(10**6) == b"" == tokenizer.decode([10**6]).encode()
    assert tokenizers["sentencepiece"].token_text(tokenizers["sentencepiece"].encode("Once upon")[1])[0] == " "


def test_half_a_surrogate_pair_is_refused(tokenizers):
    with pytest.raises(RequestError, match="half of a surrogate pair"):
        tokenizers["byte_level"].encode("\ud800")


# The detokenizer


def pushed(detokenizer: Detokenizer, ids: list[int], sizes: list[int]) -> str:
    out, at = "", 0
    for size in sizes:
        out += detokenizer.push(ids[at : at + size])
        at += size
    return out + detokenizer.push(ids[at:]) + detokenizer.finish()


tokens = st.lists(st.integers(0, 425), max_size=25)
sizes = st.lists(st.integers(0, 4), max_size=12)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(prompt=tokens, answer=tokens, sizes=sizes, skip=st.booleans())
def test_pieces_join_to_the_decoded_whole(tokenizers, kind, prompt, answer, sizes, skip):
    tokenizer = tokenizers[kind]
    detokenizer = Detokenizer(tokenizer, prompt, SamplingParams(skip_special_tokens=skip))
    whole = tokenizer.decode(prompt + answer, skip)
    hidden = tokenizer.hidden_ids(skip)
    # A character that the prompt only begins belongs to the answer, which ends it.
    before, _ = codecs.utf_8_decode(b"".join(tokenizer._visible(i, hidden) for i in prompt), "replace", False)
    assert pushed(detokenizer, answer, sizes) == whole[len(tokenizer._pieces.strip(before)) :]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30), sizes=sizes)
def test_text_comes_back_without_halves(tokenizers, kind, text, sizes):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)[1:]
    if any(tokenizer.is_special(i) for i in ids) or "�" in text:
        return
    detokenizer, out = Detokenizer(tokenizer, [tokenizer.bos_token_id], SamplingParams()), ""
    for token_id in ids:
        out += detokenizer.push([token_id])
        assert text.startswith(out)
    assert out + detokenizer.finish() == text


def test_space_in_front_of_a_continuation_stays(tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    once, upon = tokenizer.encode("Once")[1:], tokenizer.encode("upon")[1:]
    assert Detokenizer(tokenizer, [1], SamplingParams()).push(upon) == "upon"
    assert Detokenizer(tokenizer, [1, *once], SamplingParams()).push(upon) == " upon"


def test_a_prompt_may_end_within_a_character(tokenizers):
    tokenizer = tokenizers["byte_level"]
    first, *rest = tokenizer.encode("🎉", add_special_tokens=False)
    assert Detokenizer(tokenizer, [5, first], SamplingParams()).push(rest) == "🎉"


def first_stop(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """(end, start, stop) of the match whose last character comes first, found one prefix at a time."""
    for end in range(len(text) + 1):
        found = sorted((end - len(s), s) for s in stops if text[:end].endswith(s))
        if found:
            return end, *found[0]
    return None


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abc ", max_size=30),
    stops=st.lists(st.text("abc ", min_size=1, max_size=5), min_size=1, max_size=3),
    sizes=sizes,
    include=st.booleans(),
)
def test_stop_strings(tokenizers, text, stops, sizes, include):
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, [0], SamplingParams(stop=tuple(stops), include_stop_str_in_output=include))
    out = pushed(detokenizer, ids, sizes)
    match = first_stop(text, stops)
    if match is None:
        assert (out, detokenizer.stopped, detokenizer.tokens) == (text, None, len(ids))
    else:
        end, start, stop = match
        assert (out, detokenizer.stopped) == (text[: end if include else start], stop)
        used = next(n for n in range(len(ids) + 1) if len(tokenizer.decode(ids[:n])) >= end)
        assert detokenizer.tokens == used


def test_what_may_begin_a_stop_string_waits(tokenizers):
    tokenizer = tokenizers["byte_level"]
    detokenizer = Detokenizer(tokenizer, [0], SamplingParams(stop=("xyz",)))

    def push(text: str) -> str:
        return detokenizer.push(tokenizer.encode(text, add_special_tokens=False))

    assert [push("ax"), push("y"), push("xy"), push("a")] == ["a", "", "xy", "xya"]
    assert [push("x"), push("yzb"), push("c"), detokenizer.finish()] == ["", "", "", ""]
    assert detokenizer.stopped == "xyz"


def test_stop_strings_count_only_after_min_tokens(tokenizers):
    tokenizer = tokenizers["byte_level"]
    ids = [tokenizer.encode(c, add_special_tokens=False)[0] for c in "xaxbx"]
    detokenizer = Detokenizer(tokenizer, [0], SamplingParams(stop=("x",), min_tokens=3))
    assert (pushed(detokenizer, ids, [1, 1, 1, 1]), detokenizer.stopped, detokenizer.tokens) == ("xaxb", "x", 5)
    detokenizer = Detokenizer(tokenizer, [0], SamplingParams(stop=("xb",), min_tokens=3))  # begins before, ends after
    assert (pushed(detokenizer, ids, []), detokenizer.stopped) == ("xa", "xb")


# Chat templates

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def plain(folders, tmp_path) -> Path:
    (tmp_path / "tokenizer.json").write_bytes((folders["byte_level"] / "tokenizer.json").read_bytes())
    return tmp_path


def test_chat_has_one_begin_token(plain):
    tokenizer = Tokenizer.load(write(plain, tokenizer_config={"bos_token": "<s>", "add_bos_token": True, "chat_template": TEMPLATE}))
    ids = tokenizer.chat(HELLO)
    assert ids.count(0) == 1 and tokenizer.decode(ids, skip_special_tokens=False) == "<s>[user] hello\n[assistant]"
    assert tokenizer.render_chat(HELLO, add_generation_prompt=False) == "<s>[user] hello\n"


def test_where_templates_come_from(plain):
    def shown(settings=None, chat_template=None, **kwargs) -> str:
        write(plain, tokenizer_config=settings or {})
        return Tokenizer.load(plain, chat_template).render_chat(HELLO, **kwargs)

    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T{{ tools | tojson }}"}]
    assert shown({"chat_template": "{{ messages[0].content }}"}) == "hello"
    assert shown({"chat_template": named}) == "D"
    assert shown({"chat_template": named}, tools=[{"a": "<é>"}]) == 'T[{"a": "<é>"}]'
    write(plain, chat_template={"chat_template": "from json"})
    assert shown({"chat_template": "x"}) == "from json"
    (plain / "chat_template.jinja").write_text("from jinja")
    assert shown({"chat_template": "x"}) == "from jinja"
    assert shown(None, "{{ 'given' }}") == "given"
    (plain / "mine.txt").write_text("{{ messages[0].role }} {{ mood }}")
    assert shown(None, str(plain / "mine.txt"), mood="glad") == "user glad"
    with pytest.raises(ConfigError, match=r"--chat-template names 'no\.jinja', which cannot be read \(No such file"):
        shown(None, "no.jinja")
    with pytest.raises(ConfigError, match="the chat template has a mistake in line 2"):
        shown(None, "\n{% if %}")


def test_templates_in_use_render(plain):
    """Loop controls, the generation tag, trimmed blocks, dates: what templates on the Hub rely on."""
    text = """{% for m in messages %}
  {% if m.role == 'system' %}{% continue %}{% endif %}
{% generation %}{{ m.content }}{% endgeneration %}
{% endfor %}{{ strftime_now('%Y') | length }}"""
    messages = [{"role": "system", "content": "no"}, {"role": "user", "content": "yes"}]
    assert Tokenizer.load(plain, text).render_chat(messages) == "yes4"


def test_refused_messages(plain):
    with pytest.raises(RequestError, match="has no chat template: give one with --chat-template FILE") as error:
        Tokenizer.load(plain).chat(HELLO)
    assert error.value.param == "messages"
    with pytest.raises(RequestError, match="the chat template refused the messages: only users speak"):
        Tokenizer.load(plain, "{{ raise_exception('only users speak') }}").chat(HELLO)
    with pytest.raises(RequestError, match=r"the chat template refused the messages: .*unsafe"):
        Tokenizer.load(plain, "{{ messages.__class__.__mro__ }}").chat(HELLO)
    with pytest.raises(RequestError, match="a part of type 'image_url', but this server reads text parts only"):
        Tokenizer.load(plain, TEMPLATE).chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])


def test_content_as_parts(plain):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert Tokenizer.load(plain, "{{ messages[0].content }}").render_chat([{"role": "user", "content": parts}]) == "one\ntwo"


def test_continue_the_last_message(plain):
    tokenizer = Tokenizer.load(plain, TEMPLATE)
    messages = [*HELLO, {"role": "assistant", "content": "Well, "}]
    assert tokenizer.render_chat(messages, continue_final_message=True).endswith("[assistant] Well,")
    with pytest.raises(RequestError, match="needs a last message whose content the chat template shows"):
        tokenizer.render_chat([*HELLO, {"role": "assistant", "content": ""}], continue_final_message=True)


def test_the_chatml_example(plain):
    example = Path(__file__).parent.parent / "examples" / "chatml.jinja"
    assert Tokenizer.load(plain, str(example)).render_chat(HELLO) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_added_tokens_between_bytes(plain):
    """An added token that is no byte-level piece is text as it stands."""
    backend = Backend.from_file(str(plain / "tokenizer.json"))
    backend.add_tokens([AddedToken("→ü", normalized=False)])
    backend.save(str(plain / "tokenizer.json"))
    tokenizer = Tokenizer.load(plain)
    ids = tokenizer.encode("a→üb")
    assert len(ids) == 3 and tokenizer.decode(ids) == "a→üb" == tokenizer._backend.decode(ids)
