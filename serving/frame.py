"""The server-sent events of the two completion routes, made so that a token costs one f-string and not a walk through a dict."""

from serving.errors import ApiError, encode
from serving.usage import Usage

DONE = b"data: [DONE]\n\n"


class Frame:
    """The part of every event that never changes, made once an answer.

    include_usage: an event with the usage comes last, as OpenAI sends it, and a null in every event before; continuous: the usage so far
    stands in every event.
    """

    def __init__(self, head: dict, include_usage: bool, continuous: bool):
        self._open = f'data: {encode(head)[:-1]},"choices":['
        self._include_usage, self._continuous = include_usage, continuous
        self._close = '],"usage":null}\n\n' if include_usage else "]}\n\n"

    def choice(self, json_text: str, usage: Usage | None = None) -> bytes:
        """The event of one choice. usage: counted so far."""
        if self._continuous and usage is not None:
            return f'{self._open}{json_text}],"usage":{encode(usage.body())}}}\n\n'.encode()
        return f"{self._open}{json_text}{self._close}".encode()

    def last(self, usage: Usage) -> bytes:
        return (f'{self._open}],"usage":{encode(usage.body())}}}\n\n'.encode() if self._include_usage else b"") + DONE

    @staticmethod
    def failed(error: ApiError) -> bytes:
        return f"data: {encode(error.body)}\n\n".encode() + DONE
