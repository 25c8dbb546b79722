"""The benches of the API processes: the whole server over a runner that makes tokens up, and what is concluded from it."""

import json
import time
from types import SimpleNamespace

import pytest

from bench import api, null_engine, streams
from bench.answers import Answer
from jaxllm.plan import Bucket
from jaxllm.scheduler import Step


def test_every_token_comes_as_an_event_of_its_own_and_the_row_is_kept(tmp_path, capfd):
    command = ["--api-servers", "1", "--clients", "4", "--processes", "1", "--num-prompts", "12", "--input-len", "20", "--output-len", "30"]
    api.main([*command, "--num-scheduler-steps", "4", "--results", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    (row,) = json.loads(path.read_text())["rows"]
    assert row["value"] > 0 and (row["name"], row["unit"], row["api_servers"], row["clients"], row["steps"]) == (
        "api_tok_s",
        "tok/s",
        1,
        4,
        4,
    )
    said = capfd.readouterr().out
    assert "busiest of each kind" in said and "another length" not in said and "fewer or more events than tokens" not in said


def test_a_step_takes_as_long_as_is_said_and_begins_behind_the_one_before():
    runner = null_engine.NullRunner(7, step=0.02)
    rows = [SimpleNamespace(samples=samples) for samples in (2, 1, 0)]
    begun = time.perf_counter()
    first, second = (runner.run(Step(rows, Bucket(0, 4))) for _ in range(2))  # pyright: ignore[reportArgumentType]
    assert first.read().tokens == [[7, 7], [7], []] and time.perf_counter() - begun >= 0.04
    second.read()
    assert time.perf_counter() - begun >= 0.08


@pytest.mark.parametrize(
    ("busy", "limit"),
    [((0.9, 0.3, 0.2), "the API process"), ((0.9, 0.88, 0.2), "the API process and the engine process"), ((0.5, 0.5, 0.5), "none of the")],
)
def test_who_is_busy_is_the_limit(busy, limit):
    assert api.Run(1.0, 1.0, dict(zip(api.KINDS, busy, strict=True)), 1.0).limit.startswith(limit)


def test_a_server_that_does_not_start_is_an_error(capfd):
    with pytest.raises(RuntimeError, match="did not start"):
        api.Server("bench.null_engine", "serve", "--no-such-flag")


def answer(sent: float, step: float, tokens: int, error: str | None = None) -> Answer:
    return Answer(0, sent, 1, tokens, tuple(sent + step * (1 + i) for i in range(tokens)), error=error)


def test_steps_are_timed_while_all_clients_read():
    assert streams.step_ms([answer(0.0, 0.002, 100), answer(0.01, 0.004, 100)], 10, 40) == pytest.approx(3.0)
    with pytest.raises(RuntimeError, match="did not all read at once"):
        streams.step_ms([answer(0.0, 0.002, 100), answer(1.0, 0.002, 100)], 10, 40)
    with pytest.raises(RuntimeError, match="1 of 2 answers are not complete: refused"):
        streams.step_ms([answer(0.0, 0.002, 100), answer(0.0, 0.002, 100, "refused")], 10, 40)
    with pytest.raises(RuntimeError, match="too short"):
        streams.step_ms([answer(0.0, 0.002, 40)], 10, 40)


def test_both_runs_have_the_same_engine():
    args = streams.parser().parse_args(
        ["--model", "qwen2.5-0.5b", "--load-format", "dummy", "--clients", "32", "--args=--num-scheduler-steps 2"]
    )
    from serving import options

    config, _ = options.read(["--model", "folder", *streams.flags_of(args, "words")])
    assert (config.max_num_seqs, config.load_format, config.num_scheduler_steps, config.tokenizer) == (32, "dummy", 2, "words")
    assert config.max_model_len == streams.PROMPT + streams.LENGTH and not config.enable_prefix_caching
