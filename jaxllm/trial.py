"""Compiles a form once in a process of its own, before the engine does: of a chain of thousands of rules llguidance overflows its stack,
which no thread survives.

The process starts with the first form, is killed if a form takes it too long, and starts anew after that or a crash. It has less stack than
any thread that compiles or follows the form afterwards, so that what it survives, they survive.
"""

import contextlib
import functools
import json
import resource
import select
import signal
import subprocess
import sys
import threading
import weakref

TRIAL_S = 5.0
_STACK = 2**20
_MEMORY = 8 * 2**30


class Trial:
    """The way to that process. Any thread may ask."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def fault(self, grammar: str, limits: dict, special: list[str]) -> str | None:
        """Why `grammar` must not be compiled; None if it is harmless, be it right or wrong. special: tokens that it may name."""
        with self._lock:
            process = self._process = self._process or self._start()
            assert process.stdin is not None and process.stdout is not None
            answer = None
            try:
                process.stdin.write(json.dumps([grammar, limits, special]).encode() + b"\n")
                process.stdin.flush()
                ready, _, _ = select.select([process.stdout], [], [], TRIAL_S)
                answer = process.stdout.read(1) if ready else None
            except BrokenPipeError:
                answer = b""
            if answer == b".":
                return None
            _end(process)
            self._process = None
            return f"compiling it takes more than {TRIAL_S:.0f} s" if answer is None else "it is nested too deeply to be compiled"

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-m", "jaxllm.trial"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=-1)
        weakref.finalize(self, _end, process)
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None and not pipe.closed:
            with contextlib.suppress(BrokenPipeError):  # what was not written is not wanted any more
                pipe.close()


def _serve() -> None:
    """One JSON line in, one dot out, until there are no more."""
    from llguidance import LLMatcher, LLParserLimits

    for line in sys.stdin.buffer:
        grammar, limits, special = json.loads(line)
        matcher = LLMatcher(_tokenizer(tuple(special)), grammar, log_level=0, limits=LLParserLimits(**limits))
        matcher.compute_bitmask()
        sys.stdout.buffer.write(b".")
        sys.stdout.buffer.flush()


@functools.cache
def _tokenizer(special: tuple[str, ...]):
    """The bytes, and these tokens: as good as any vocabulary for finding out what a form costs."""
    from llguidance import LLTokenizer, TokenizerWrapper

    class Tokens:
        def __init__(self):
            self.tokens = [*(bytes([byte]) for byte in range(256)), *(text.encode() for text in special), b"<end>"]
            self.special_token_ids = list(range(256, len(self.tokens)))
            self.eos_token_id, self.bos_token_id = len(self.tokens) - 1, None

        def __call__(self, text: bytes) -> list[int]:
            return list(text)

    return LLTokenizer(TokenizerWrapper(Tokens()), 257 + len(special), slices=[])


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the end of stdin is what ends this
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    threading.stack_size(_STACK)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()
