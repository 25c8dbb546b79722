"""The engine behind its socket: the same answers as in-process, nothing left of who leaves, and clear words when it dies."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from server_fixtures import STORIES, serving, wait_until

from jaxllm import LLM, Completion, EngineConfig, EngineDeadError, Request, RequestError, SamplingParams, StructuredOutputs
from serving import remote_engine, wire
from serving.remote_engine import RemoteEngine, StartFailed

CONFIG = EngineConfig(STORIES, device="cpu", dtype="float32", max_num_seqs=8, max_model_len=256, max_logprobs=5, enforce_eager=True)
PROMPTS = [(1, 403, 407, 261, 378), (1, 50, 60, 70), (1,)]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=30),
    SamplingParams(temperature=0.8, seed=3, max_tokens=20, n=2, logprobs=2, stop=["the"]),
    SamplingParams(temperature=0, max_tokens=8, logit_bias={9: 5.0}, prompt_logprobs=1, min_tokens=4),
]


@pytest.fixture(scope="module")
def engine():
    engine = RemoteEngine(CONFIG).wait()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def loop():
    """One event loop for all tests of the module: an engine belongs to one."""
    with asyncio.Runner() as runner:
        yield runner


async def gather(engine, request):
    return [output async for output in engine.generate(request)]


def joined(outputs):
    found = {}
    for output in outputs:
        for c in output.outputs:
            text, ids, logprobs = found.setdefault(c.index, ("", (), ()))[:3]
            found[c.index] = text + c.text, ids + tuple(c.token_ids), logprobs + tuple(c.logprobs or ()), c.finish_reason, c.stop_reason
    prompt_logprobs = [o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None]
    return found, prompt_logprobs


def test_answers_are_those_of_an_engine_in_this_process(engine, loop):
    requests = [Request(f"{i}-{j}", prompt, params) for i, prompt in enumerate(PROMPTS) for j, params in enumerate(PARAMS)]

    async def ask_all():
        return await asyncio.gather(*(gather(engine, request) for request in requests))

    answers = loop.run(ask_all())
    with LLM(**{field: getattr(CONFIG, field) for field in CONFIG.__dataclass_fields__}) as llm:
        expected = llm.generate([r.prompt_token_ids for r in requests], [r.params for r in requests], use_tqdm=False)
    for outputs, whole in zip(answers, expected, strict=True):
        assert outputs[-1].finished and outputs[0].prompt_token_ids == whole.prompt_token_ids
        (found, prompt_logprobs), (alone, alone_logprobs) = joined(outputs), joined([whole])
        assert {i: (text, ids, *ends) for i, (text, ids, _, *ends) in found.items()} == {
            i: (text, ids, *ends) for i, (text, ids, _, *ends) in alone.items()
        }
        for i in found:
            assert_alike(found[i][2], alone[i][2])
        for here, there in zip(prompt_logprobs, alone_logprobs, strict=True):
            assert_alike(here, there)


def assert_alike(here, there):
    """The same tokens with the same log-probabilities, but for what two compilations of one program may round differently."""
    assert len(here) == len(there)
    for a, b in zip(here, there, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a[0].token_id == b[0].token_id
            np.testing.assert_allclose([lp.logprob for lp in a], [lp.logprob for lp in b], atol=1e-4)


def test_leaving_gives_everything_back(engine, loop):
    async def leave(i):
        request = Request(f"gone-{i}", (1, 403), SamplingParams(max_tokens=200, ignore_eos=True))
        async with contextlib.aclosing(engine.generate(request)) as outputs:
            async for _ in outputs:
                return

    async def all_leave():
        await asyncio.gather(*(leave(i) for i in range(50)))
        for _ in range(100):
            stats = await engine.stats()
            if not stats.running + stats.waiting + stats.held:
                break
            await asyncio.sleep(0.05)
        assert (stats.running, stats.waiting, stats.held) == (0, 0, 0)
        assert stats.free + stats.cached == stats.pages

    loop.run(all_leave())


def test_what_can_never_be_served_is_refused_here_and_there(engine, loop):
    with pytest.raises(RequestError, match="maximum context length is 256"):
        loop.run(gather(engine, Request("long", (1,) * 300, SamplingParams())))

    async def twice():
        request = Request("same", (1, 403), SamplingParams(max_tokens=100, ignore_eos=True))
        first = asyncio.create_task(gather(engine, request))
        await asyncio.sleep(0)
        engine._send(wire.Add(request))
        with pytest.raises(RequestError, match="'same' is already running"):
            await first

    loop.run(twice())


def test_what_waits_to_be_read_comes_as_one_output_and_an_error_behind_it(engine, loop):
    """Nobody takes the first answers until they are whole; then there is one output, with a completion for each token."""

    async def ask():
        late, whole = (Request(name, (1, 403), SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)) for name in ("late", "whole"))
        outputs = engine.generate(late)
        first = await anext(outputs)
        expected = await gather(engine, whole)
        rest = [output async for output in outputs]
        assert [len(output.outputs) for output in rest] == [12 - len(first.outputs)] and rest[0].finished
        assert all(len(completion.token_ids) == 1 for completion in rest[0].outputs)
        assert joined([first, *rest]) == joined(expected)

    loop.run(ask())

    async def fail():
        box = remote_engine._Box()
        taken = asyncio.create_task(box.take())
        await asyncio.sleep(0)
        piece = wire.Piece("x", (Completion(0, "a", (1,)),), False, 0)
        box.put(piece)
        box.put(piece)
        box.fail(EngineDeadError("gone"))
        assert await taken == [piece, piece] and not box.ended
        with pytest.raises(EngineDeadError, match="gone"):
            await box.take()
        assert box.ended

    loop.run(fail())


def test_forms_are_compiled_and_followed_there(engine, loop):
    """The engine's process says what cannot be honoured, and an answer that gets out of hand is that request's error alone."""

    def asked(name, stream=True, **form):
        params = SamplingParams(max_tokens=200, seed=1, n=2, structured_outputs=StructuredOutputs(**form), ignore_eos=True)
        return Request(name, (1, 403), params, stream=stream)

    async def ask():
        bad = asyncio.create_task(gather(engine, asked("bad", regex="(")))
        wild = asyncio.create_task(gather(engine, asked("wild", stream=False, regex="((a{1,100}){1,100}){1,100}")))
        good = asyncio.create_task(gather(engine, asked("good", regex="[0-9]{3}-[0-9]{4}")))
        return await asyncio.gather(bad, wild, good, return_exceptions=True)

    bad, wild, good = loop.run(ask())
    assert isinstance(bad, RequestError) and "unclosed group" in str(bad) and bad.param == "structured_outputs"
    assert {(c.finish_reason, str(c.stop_reason)[:40]) for o in wild for c in o.outputs} == {
        ("error", "structured_outputs could not be followed")
    }
    found, _ = joined(good)
    assert all(re.fullmatch("[0-9]{3}-[0-9]{4}", text) and end == "stop" for text, _, _, end, _ in found.values()) and len(found) == 2


def test_two_processes_may_use_the_same_request_id(engine):
    """Ids are their sender's own: a second client's first-request must not meet the first one's."""
    import zmq

    with zmq.Context() as context, context.socket(zmq.DEALER) as one, context.socket(zmq.DEALER) as other:
        request = Request("twin", (1, 403), SamplingParams(max_tokens=3, temperature=0), stream=False)
        for socket in (one, other):
            socket.linger = 0
            socket.connect(engine.process.address)
            socket.send(wire.encode(wire.Add(request)))
        answers = []
        for socket in (one, other):
            assert socket.poll(10_000)
            answers.append(wire.decode_answer(socket.recv()))
        assert answers[0] == answers[1] and isinstance(answers[0], wire.Pieces)


def test_a_config_that_does_not_fit_says_so_once(capfd):
    with pytest.raises(StartFailed, match="ended with status 1"):
        RemoteEngine(EngineConfig(STORIES, device="cpu", max_model_len=100_000)).wait()
    assert capfd.readouterr().err.count("--max-model-len 100000 is more than the 512 positions") == 1


def test_an_engine_that_is_killed_fails_what_runs_and_health():
    engine = RemoteEngine(EngineConfig(STORIES, device="cpu", max_num_seqs=2, enforce_eager=True, max_num_batched_tokens=32)).wait()
    try:
        with serving(engine) as served:
            assert served.http.get("/health").status_code == 200
            connection = served.open("/v1/completions", {"prompt": "Once", "max_tokens": 500, "ignore_eos": True, "stream": True})
            connection.recv(100)
            os.kill(engine.process.pid, signal.SIGKILL)
            wait_until(lambda: served.http.get("/health").status_code == 503, 2)
            rest = b""
            while data := connection.recv(65536):
                rest += data
                if b"[DONE]" in rest:
                    break
            connection.close()
            assert b"the engine has stopped: its process ended with status -9" in rest
            answer = served.post("/v1/completions", {"prompt": "Once"})
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "ServiceUnavailableError")
    finally:
        engine.close()
    with pytest.raises(EngineDeadError):
        asyncio.run(gather(engine, Request("late", (1,), SamplingParams())))


def test_the_engine_process_does_not_outlive_who_started_it():
    script = (
        "import sys; from jaxllm import EngineConfig; from serving.remote_engine import RemoteEngine\n"
        "engine = RemoteEngine(EngineConfig(device='cpu', max_num_seqs=1, enforce_eager=True, max_num_batched_tokens=32)).wait()\n"
        "print(engine.process.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = json.loads(parent.stdout.readline())
        parent.kill()
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the engine process is still there")


def test_an_engine_process_that_loads_does_not_outlive_who_started_it():
    program = (
        "import sys, time, serving.engine_process as e\n"
        "def load(config): print('loading', flush=True); time.sleep(60)\n"
        "sys.exit(e.main('ipc:///tmp/never', load))"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"{}\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"loading\n"
        time.sleep(0.1)
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(10) == 1


def test_several_api_processes_share_one_engine_and_end_together():
    """As a user starts it: both processes answer, and when one dies the rest end too and say so by their status."""
    argv = ["--port", "0", "--api-server-count", "2", "--device", "cpu", "--max-num-seqs", "2", "--enforce-eager", "--max-model-len", "64"]
    with subprocess.Popen([sys.executable, "-m", "serving", *argv], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().split(" at ")[1].strip()
        for _ in range(8):  # each a connection of its own, dealt out by the kernel
            answer = httpx.post(f"{url}/completions", json={"prompt": "Once", "max_tokens": 4}, timeout=30)
            assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4
        children = [int(pid) for pid in Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()]
        workers = [pid for pid in children if b"serving.api_process" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert (len(children), len(workers)) == (3, 2)
        os.kill(workers[0], signal.SIGKILL)
        assert server.wait(30) == 1
    for pid in children:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
