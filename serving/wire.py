"""What goes between API processes and the engine process: msgpack messages, tagged by their type's name.

The prompt travels once, with the request; what comes back names the request only. Questions are answered in the order they were asked.
"""

from typing import Any

import msgspec

from jaxllm.request import Completion, Limits, Request, Stats, TokenLogprobs


class Add(msgspec.Struct, tag=True):
    request: Request


class Abort(msgspec.Struct, tag=True):
    request_id: str


class Ask(msgspec.Struct, tag=True):
    """Wants a Hello, and with it the figures of the moment."""


class Keep(msgspec.Struct, tag=True):
    """Something to keep for later, or (None) to drop. Answered by Done."""

    key: str
    value: bytes | None


class Recall(msgspec.Struct, tag=True):
    """Wants what was kept, as Recalled."""

    key: str


class Forget(msgspec.Struct, tag=True):
    """Empties the prefix cache. Answered by Done."""


class Profile(msgspec.Struct, tag=True):
    """Starts a profile in the folder, or (None) ends it. Answered by Done."""

    folder: str | None


class Hello(msgspec.Struct, tag=True):
    """What an API process must know about the engine."""

    model_name: str
    model_path: str
    default_params: dict[str, Any]
    limits: Limits
    stats: Stats


class Recalled(msgspec.Struct, tag=True):
    value: bytes | None


class Done(msgspec.Struct, tag=True):
    """error: why it could not be done."""

    error: str | None = None


class Piece(msgspec.Struct, array_like=True):
    """An Output without what its request already says."""

    request_id: str
    completions: tuple[Completion, ...]
    finished: bool
    cached: int
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    embedding: tuple[float, ...] | None = None


class Pieces(msgspec.Struct, tag=True):
    """What one turn of the engine made for one API process."""

    pieces: list[Piece]


class Refused(msgspec.Struct, tag=True):
    """overloaded: the queue was full; otherwise it can never be served."""

    request_id: str
    message: str
    param: str | None
    overloaded: bool = False


Question = Ask | Keep | Recall | Forget | Profile
Reply = Hello | Recalled | Done
encode = msgspec.msgpack.Encoder().encode
decode_question = msgspec.msgpack.Decoder(Add | Abort | Question).decode
decode_answer = msgspec.msgpack.Decoder(Reply | Pieces | Refused).decode
