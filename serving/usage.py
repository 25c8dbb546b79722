"""The tokens of one answer, counted as its outputs pass by, and the `usage` that OpenAI's answers say them in."""

from jaxllm.request import Completion, Output


class Usage:
    def __init__(self, prompts: int):
        self._prompt, self._cached = [0] * prompts, [0] * prompts
        self.completion_tokens = 0
        self.reasoning_tokens: int | None = None  # of them, what was thought; None where nobody looks for thoughts
        self.finish_reasons: list[str] = []

    def prompt(self, i: int, output: Output) -> None:
        """What an output of prompt i says about it."""
        self._prompt[i] = len(output.prompt_token_ids)
        self._cached[i] = max(self._cached[i], output.num_cached_tokens)

    def count(self, completion: Completion) -> None:
        self.completion_tokens += len(completion.token_ids)
        if completion.finish_reason is not None:
            self.finish_reasons.append(completion.finish_reason)

    @property
    def prompt_tokens(self) -> int:
        return sum(self._prompt)

    @property
    def cached_tokens(self) -> int:
        return sum(self._cached)

    def body(self) -> dict:
        thought = {} if self.reasoning_tokens is None else {"completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens}}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            **thought,
        }
