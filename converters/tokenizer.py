"""A checkpoint folder's tokenizer, whatever its files, as one `tokenizers.Tokenizer` with its special tokens and chat templates.

Three kinds of folder are read: tokenizer.json; a sentencepiece tokenizer.model alone (Llama 2, Mistral); vocab.json with
merges.txt (OPT, GPT-2). The Rust library is used directly: importing transformers takes a second and more, and version 5 reads a
lone tokenizer.model without its leading space and with its merges in another order, and gives OPT an end token it never had.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPACE = "▁"  # what sentencepiece writes for a space
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OPT = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}  # its folders may not say


@dataclass(frozen=True)
class TokenizerFiles:
    """What a folder says. special: {"bos_token": "<s>", ...}; templates: {"default": Jinja text, ...}, empty if there is none."""

    backend: Tokenizer
    special: dict[str, str] = field(default_factory=dict)
    templates: dict[str, str] = field(default_factory=dict)


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """The tokenizer of a local folder. Raises OSError if it holds none, ValueError if what it holds is not understood."""
    settings = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    model = _read_json(folder / "config.json")
    if (folder / "tokenizer.json").is_file():
        backend = _from_tokenizer_json(folder / "tokenizer.json")
        flags = {name: settings[name] for name in ("add_bos_token", "add_eos_token") if settings.get(name) is not None}
        special = _special(settings, model, backend)
        if flags:
            _add_ends(backend, special, **flags)
    elif (folder / "tokenizer.model").is_file():
        backend, special = _from_sentencepiece(folder / "tokenizer.model", legacy=settings.get("legacy", True))
        special |= _special(settings, model, backend)
        _add_ends(backend, special, settings.get("add_bos_token", True), settings.get("add_eos_token", False))
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = _from_merges(folder)
        opt = model.get("model_type") == "opt"
        special = (_OPT if opt else {}) | _special(settings, model, backend)
        _add_ends(backend, special, settings.get("add_bos_token", opt), settings.get("add_eos_token", False))
    else:
        wanted = "tokenizer.json, or tokenizer.model, or vocab.json with merges.txt"
        raise OSError(f"{folder} holds no tokenizer that can be read: it needs {wanted}; name another with --tokenizer")
    _add_listed(backend, settings.get("added_tokens_decoder") or {})
    _add_special(backend, special.values())
    return TokenizerFiles(backend, special, _templates(folder, settings))


def byte_fallback_bpe(
    pieces: Sequence[str], scores: Sequence[float | None], *, unk: str, prefix_space: bool, legacy: bool = True
) -> Tokenizer:
    """A sentencepiece BPE model, given as its pieces in order of their ids, as a Tokenizer that splits text alike.

    A space is "▁" in the pieces, a byte "<0xHH>"; a piece that merging must never make (special, byte) has the score None.
    prefix_space: text gets a space in front. legacy: so does the text after every special token (what Llama 2 was trained with),
    not only at the beginning.
    """
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=_merges(vocab, scores), unk_token=unk, fuse_unk=True, byte_fallback=True))
    if prefix_space and not legacy:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    else:
        prepend = [normalizers.Prepend(SPACE)] if prefix_space else []
        backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix_space else []
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _merges(vocab: dict[str, int], scores: Sequence[float | None]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the best score first: sentencepiece always merges into the best-scored piece.

    Equal scores go by id. Sentencepiece takes what stands further left, which ranks cannot say;
    the pieces of several spaces, which share one score in Llama 2 and Mistral, come out alike this way.
    """
    found = []
    for piece, i in vocab.items():
        if (score := scores[i]) is None:
            continue
        for cut in range(1, len(piece)):
            if piece[:cut] in vocab and piece[cut:] in vocab:
                found.append((-score, i, piece[:cut], piece[cut:]))
    return [(left, right) for *_, left, right in sorted(found)]


def _from_tokenizer_json(path: Path) -> Tokenizer:
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception
        raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from error
    backend.no_truncation()  # some files keep the settings of the last training run
    backend.no_padding()
    return backend


def _from_sentencepiece(path: Path, *, legacy: bool) -> tuple[Tokenizer, dict[str, str]]:
    from sentencepiece import sentencepiece_model_pb2  # late: only these folders need protobuf

    pb: Any = sentencepiece_model_pb2  # generated at import, so no type checker knows its names
    proto = pb.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a sentencepiece model: {error}") from error
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != trainer.BPE:
        kind = trainer.ModelType.Name(trainer.model_type)
        raise ValueError(f"{path} is a {kind} sentencepiece model, but only BPE is understood; save it as tokenizer.json with transformers")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        what = f"{path} changes text before splitting it ({normalizer.name})"
        raise ValueError(f"{what}, which is not understood; save it as tokenizer.json with transformers")
    piece = pb.ModelProto.SentencePiece
    pieces = [p.piece for p in proto.pieces]
    unk = next(p.piece for p in proto.pieces if p.type == piece.UNKNOWN)
    scores = [p.score if p.type == piece.NORMAL else None for p in proto.pieces]
    backend = byte_fallback_bpe(pieces, scores, unk=unk, prefix_space=normalizer.add_dummy_prefix, legacy=legacy)
    _add_special(backend, [p.piece for p in proto.pieces if p.type in (piece.UNKNOWN, piece.CONTROL)])
    backend.add_tokens([AddedToken(p.piece, normalized=False) for p in proto.pieces if p.type == piece.USER_DEFINED])
    ends = {"unk_token": unk, "bos_token": trainer.bos_piece, "eos_token": trainer.eos_piece, "pad_token": trainer.pad_piece}
    return backend, {name: text for name, text in ends.items() if text in pieces}


def _from_merges(folder: Path) -> Tokenizer:
    """GPT-2's byte-level BPE, which knows no unknown text."""
    backend = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    usual = ("<s>", "</s>", "<pad>", "<unk>", "<mask>", "<|endoftext|>")
    _add_special(backend, [text for text in usual if backend.token_to_id(text) is not None])
    return backend


def _special(settings: dict[str, Any], model: dict[str, Any], backend: Tokenizer) -> dict[str, str]:
    """Special tokens by role, from the tokenizer's settings or, where these are silent, config.json's ids."""
    found = {}
    for name in _NAMES:
        if text := _text(settings.get(name)):
            found[name] = text
        elif name not in settings and isinstance(ids := model.get(f"{name}_id"), int | list):
            first = ids[0] if isinstance(ids, list) and ids else ids
            if isinstance(first, int) and first >= 0 and (text := backend.id_to_token(first)):
                found[name] = text
    return found


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _add_ends(backend: Tokenizer, special: dict[str, str], add_bos_token: bool = False, add_eos_token: bool = False) -> None:
    """Makes encoding put the begin token before, the end token after, or neither."""
    before = [special["bos_token"]] if add_bos_token and "bos_token" in special else []
    after = [special["eos_token"]] if add_eos_token and "eos_token" in special else []
    ids = [(text, backend.token_to_id(text)) for text in dict.fromkeys([*before, *after])]
    backend.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=ids)


def _add_special(backend: Tokenizer, texts: Iterable[str]) -> None:
    """Marks tokens of the vocabulary as special; one it lacks is left out, for no model has an embedding for it."""
    known = [text for text in dict.fromkeys(texts) if backend.token_to_id(text) is not None]
    marked = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in known if text not in marked])


def _add_listed(backend: Tokenizer, listed: dict[str, dict[str, Any]]) -> None:
    """Adds tokenizer_config.json's added_tokens_decoder, {id: token}, where the tokenizer itself lacks them. Ids must follow on."""
    for key, token in sorted(listed.items(), key=lambda item: int(item[0])):
        have = backend.token_to_id(token["content"])
        if have is None:
            flags = {name: bool(token[name]) for name in ("lstrip", "rstrip", "single_word", "normalized", "special") if name in token}
            backend.add_tokens([AddedToken(token["content"], **flags)])
            have = backend.token_to_id(token["content"])
        elif token.get("special"):
            _add_special(backend, [token["content"]])
        if have != int(key):
            raise ValueError(f"tokenizer_config.json gives {token['content']!r} the id {key}, but the tokenizer gives it {have}")


def _templates(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name: chat_template.jinja, chat_template.json, or tokenizer_config.json's string or list."""
    if (path := folder / "chat_template.jinja").is_file():
        return {"default": path.read_text(encoding="utf-8")}
    found = _read_json(folder / "chat_template.json").get("chat_template") or settings.get("chat_template") or {}
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list):
        return {entry["name"]: entry["template"] for entry in found}
    return dict(found)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
