"""The engine's one log line every 10 s: how fast it is, who runs and waits, how full the cache is. Silent while nothing happens."""

import time

from jaxllm.request import Stats

LOG_S = 10


class LogLine:
    """Remembers the figures of the last line, for rates are differences."""

    def __init__(self):
        self._at, self._prompt, self._generated, self._cached = time.monotonic(), 0, 0, 0

    def due(self) -> bool:
        return time.monotonic() - self._at >= LOG_S

    def text(self, stats: Stats) -> str:
        """The line, and a new beginning. Empty if nothing ran since the last one."""
        now = time.monotonic()
        seconds, self._at = now - self._at, now
        prompt, self._prompt = stats.prompt_tokens - self._prompt, stats.prompt_tokens
        generated, self._generated = stats.generation_tokens - self._generated, stats.generation_tokens
        cached, self._cached = stats.cached_tokens - self._cached, stats.cached_tokens
        if not (prompt or generated or stats.running or stats.waiting):
            return ""
        return (
            f"Avg prompt throughput: {prompt / seconds:.1f} tokens/s, Avg generation throughput: {generated / seconds:.1f} tokens/s, "
            f"Running: {stats.running} reqs, Waiting: {stats.waiting} reqs, KV cache usage: {100 * stats.held / stats.pages:.1f}%, "
            f"Prefix cache hit rate: {100 * cached / prompt if prompt else 0:.1f}%"
        )
