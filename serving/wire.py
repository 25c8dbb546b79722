"""What goes between API processes and the engine process: msgpack messages, tagged by their type's name.

The prompt travels once, with the request; what comes back names the request only.
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


class Hello(msgspec.Struct, tag=True):
    """What an API process must know about the engine."""

    model_name: str
    model_path: str
    default_params: dict[str, Any]
    limits: Limits
    stats: Stats


class Piece(msgspec.Struct, array_like=True):
    """An Output without what its request already says."""

    request_id: str
    completion: Completion
    finished: bool
    cached: int
    prompt_logprobs: list[TokenLogprobs | None] | None = None


class Pieces(msgspec.Struct, tag=True):
    """What one turn of the engine made for one API process."""

    pieces: list[Piece]


class Refused(msgspec.Struct, tag=True):
    request_id: str
    message: str
    param: str | None


encode = msgspec.msgpack.Encoder().encode
decode_question = msgspec.msgpack.Decoder(Add | Abort | Ask).decode
decode_answer = msgspec.msgpack.Decoder(Hello | Pieces | Refused).decode
