"""Text to token ids and back: Tokenizer, and Detokenizer for an answer that is still growing.

A token is a string of bytes, and text is these bytes read as UTF-8: that is the meaning of both decoders in use (byte-level BPE, and
sentencepiece with byte fallback), and it makes a token's share of the work constant however long the answer is. Encoding is left
to the `tokenizers` library, files to converters/tokenizer.py, templates to chat_template.py.
"""

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.tokenizer import TokenizerFiles, read_tokenizer
from jaxllm.request import ConfigError, RequestError, SamplingParams

if TYPE_CHECKING:
    from jaxllm.chat_template import ChatTemplate


class Tokenizer:
    """One model's tokenizer. Ids without a token (a padded vocabulary) decode to nothing."""

    def __init__(self, files: TokenizerFiles, chat_template: str | None = None):
        self._backend = files.backend
        self._pieces = _pieces(files.backend)
        self._bytes: dict[int, bytes] = {}
        added = files.backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self.special_tokens = dict(files.special)
        self.bos_token_id = self._id("bos_token")
        self.eos_token_id = self._id("eos_token")
        self.vocab_size = max([files.backend.get_vocab_size(with_added_tokens=True), *(i + 1 for i in added)])
        self._templates = {"default": _given(chat_template)} if chat_template else files.templates
        self._chat = None
        if chat_template:
            self._chat_template()  # a mistake in the file that was asked for shows at start

    @classmethod
    def load(cls, folder: str | Path, chat_template: str | None = None) -> "Tokenizer":
        """The tokenizer of a local folder. `chat_template`, a file or the template itself, takes the place of the model's own.

        Raises ConfigError if a file is missing or not understood.
        """
        try:
            return cls(read_tokenizer(Path(folder)), chat_template)
        except (OSError, ValueError) as error:
            raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a plain text, with the begin token that the model's tokenizer adds unless told not to."""
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError):
            raise RequestError("the text is not valid Unicode: it holds half of a surrogate pair") from None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence. Bytes that are no UTF-8 become U+FFFD."""
        hidden = self.hidden_ids(skip_special_tokens)
        text = b"".join(self._visible(i, hidden) for i in ids).decode("utf-8", "replace")
        return self._pieces.strip(text)

    def chat(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        """Token ids of a conversation, ready for the answer (see `render_chat`).

        A template writes the whole prompt, its begin token included, so the tokenizer adds none.
        """
        return self.encode(self.render_chat(messages, **kwargs), add_special_tokens=False)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        """The prompt text of a conversation, as ChatTemplate.render."""
        return self._chat_template().render(messages, **kwargs)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text; it may be a part of a character."""
        found = self._bytes.get(token_id)
        if found is None:
            piece = self._backend.id_to_token(token_id)
            found = self._bytes[token_id] = b"" if piece is None else self._pieces.to_bytes(piece)
        return found

    def token_text(self, token_id: int) -> str:
        """A token by itself, for showing; a part of a character shows as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def special_id(self, text: str) -> int | None:
        """The special token that is written so; None if there is none, or an ordinary one."""
        found = self._backend.token_to_id(text)
        return found if found in self._special_ids else None

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """The model's templates by name, of which "default" is the usual one."""
        return self._templates

    def hidden_ids(self, skip_special_tokens: bool, shown: Sequence[int] = ()) -> frozenset[int]:
        """The tokens that are left out of the text."""
        if not skip_special_tokens:
            return frozenset()
        return self._special_ids.difference(shown) if shown else self._special_ids

    def _visible(self, token_id: int, hidden: frozenset[int]) -> bytes:
        return b"" if token_id in hidden else self.token_bytes(token_id)

    def _id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def _chat_template(self) -> "ChatTemplate":
        if self._chat is None:
            from jaxllm.chat_template import ChatTemplate  # late: jinja2 is only for chats

            self._chat = ChatTemplate(self._templates, self.special_tokens)
        return self._chat


class Detokenizer:
    """The text of one answer, as it grows.

    Text comes out as soon as it cannot change: half a character waits, and so does what may be the beginning of a stop string. The
    pieces joined, however the tokens arrive, are `decode(prompt + answer)` without `decode(prompt)`, cut at the stop string.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams):
        self.stopped: str | None = None  # the stop string that ended the text
        self.tokens = 0  # how many were pushed, up to and with the one that completed the stop string
        self._tokenizer = tokenizer
        self._params = params
        self._held = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # The answer may complete a character that the prompt began: the last tokens leave the decoder where the prompt ends.
        self._hidden = hidden = tokenizer.hidden_ids(params.skip_special_tokens, params.shown_special_token_ids)
        for token_id in prompt_token_ids[-8:]:
            self._decoder.decode(tokenizer._visible(token_id, hidden))
        self._at_start = not any(tokenizer._visible(token_id, hidden) for token_id in prompt_token_ids)

    def push(self, ids: Iterable[int]) -> str:
        """The text that these tokens make certain. After a stop string nothing more comes."""
        return "".join([self.add(token_id) for token_id in ids])

    def add(self, token_id: int) -> str:
        """As `push`, of one token."""
        if self.stopped is not None:
            return ""
        self.tokens += 1
        return self._advance(self._decoder.decode(self._tokenizer._visible(token_id, self._hidden)))

    def finish(self) -> str:
        """What was held back; call it once, after the last token."""
        if self.stopped is not None:
            return ""
        out = self._advance(self._decoder.decode(b"", final=True))
        out, self._held = out + self._held, ""
        return out

    def _advance(self, text: str) -> str:
        if not text:
            return ""
        if self._at_start:
            text = self._tokenizer._pieces.strip(text)
            self._at_start = False
        if not self._params.stop:
            return text
        self._held += text
        if self.tokens > self._params.min_tokens and (match := _first_match(self._held, len(text), self._params.stop)):
            start, self.stopped = match
            end = start + len(self.stopped) if self._params.include_stop_str_in_output else start
            out, self._held = self._held[:end], ""
            return out
        keep = possible_beginning(self._held, self._params.stop)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out


def _first_match(text: str, new: int, stops: Sequence[str]) -> tuple[int, str] | None:
    """(start, stop string) of the match that is complete first, the longest if several are, among those ending in the last `new`."""
    found = []
    for stop in stops:
        start = text.find(stop, max(0, len(text) - new - len(stop) + 1))
        if start >= 0:
            found.append((start + len(stop), start, stop))
    return min(found)[1:] if found else None


def possible_beginning(text: str, stops: Sequence[str]) -> int:
    """The length of the longest end of `text` with which a stop string may begin."""
    longest = 0
    for stop in stops:
        start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
        while start >= 0 and not stop.startswith(text[start:]):
            start = text.find(stop[0], start + 1)
        if start >= 0:
            longest = max(longest, len(text) - start)
    return longest


class _BytePieces:
    """Byte-level BPE: every byte is written as a printable character, as GPT-2 chose them."""

    def __init__(self):
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self._byte = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}

    def to_bytes(self, piece: str) -> bytes:
        try:
            return bytes(self._byte[character] for character in piece)
        except KeyError:
            return piece.encode()  # an added token is written as it is

    def strip(self, text: str) -> str:
        return text


class _SpacePieces:
    """Sentencepiece: a sign for the space, <0xHH> for a byte, and `spaces` of them at the beginning that were never in the text."""

    def __init__(self, sign: str, spaces: int):
        self._sign, self._spaces = sign, spaces

    def to_bytes(self, piece: str) -> bytes:
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        return piece.replace(self._sign, " ").encode()

    def strip(self, text: str) -> str:
        extra = len(text) - len(text.lstrip(" "))
        return text[min(extra, self._spaces) :]


def _pieces(backend) -> _BytePieces | _SpacePieces:
    """How this tokenizer writes bytes, read off its decoder. Raises ConfigError for one that is not understood."""
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {"type": "nothing"}
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _BytePieces()
    if kinds == ["Metaspace"]:
        return _SpacePieces(steps[0]["replacement"], int(steps[0].get("prepend_scheme", "always") != "never"))
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"]) and steps[0]["content"] == " ":
        return _SpacePieces(steps[0]["pattern"]["String"], steps[3]["start"] if kinds[3:] else 0)
    known = "ByteLevel, Metaspace, and Replace + ByteFallback + Fuse (+ Strip)"
    raise ConfigError(f"the tokenizer decodes with {' + '.join(map(str, kinds))}, but the decoders understood are {known}")


def _given(chat_template: str) -> str:
    from jaxllm.chat_template import read_template

    return read_template(chat_template)
