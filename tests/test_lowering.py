"""Programs lowered by several processes: the same programs, whatever becomes of those processes."""

import dataclasses
import pickle
import subprocess
import sys
from functools import cache
from types import SimpleNamespace

import jax
import pytest
from engines import LANES, counted_compilations, make_plan
from server_fixtures import STORIES
from tiny import GOLDENS

from converters.checkpoint import open_checkpoint
from jaxllm import LLM, SamplingParams, lowering
from jaxllm.lowering import MOST, Answer, Recipe, helpers_for, lowered
from jaxllm.parallel import make_mesh
from jaxllm.plan import Bucket


def recipe(devices: int = 1, **changes) -> Recipe:
    model = open_checkpoint(GOLDENS / "qwen2").config.for_context(48)
    plan = make_plan(tensor_parallel_size=devices, **changes)
    return Recipe(model, plan, make_mesh(jax.devices()[:devices]), "reference")


def short() -> Recipe:
    """Of fewer steps: what matters is that all are lowered."""
    return recipe(buckets=(Bucket(0, 1), Bucket(0, LANES)))


@cache
def alone(devices: int) -> dict[str, str]:
    """What this process makes of the recipe."""
    return texts(recipe(devices), helpers=0)


def texts(made: Recipe, helpers: int) -> dict[str, str]:
    return {program.name: done.as_text() for program, done in lowered(made.programs(), {}, made, helpers)}


@pytest.fixture
def helped(monkeypatch) -> SimpleNamespace:
    """This process takes a program only when no helper will. adopted: the names of those that helpers lowered; processes: the helpers."""
    seen = SimpleNamespace(adopted=[], processes=[])
    adopt, start, take_turn = Answer.adopted, lowering._start, lowering._Work.next

    def noted(self, program, options):
        done = adopt(self, program, options)
        seen.adopted.append(program.name)
        return done

    def started():
        seen.processes.append(start())
        return seen.processes[-1]

    def after_the_helpers(self):
        for thread in self._threads:
            thread.join()
        return take_turn(self)

    monkeypatch.setattr(Answer, "adopted", noted)
    monkeypatch.setattr(lowering, "_start", started)
    monkeypatch.setattr(lowering._Work, "next", after_the_helpers)
    return seen


@pytest.mark.parametrize("devices", [1, 2])
def test_helpers_lower_to_the_same_text(devices, helped):
    made = recipe(devices)
    assert texts(made, helpers=2) == alone(devices)
    assert sorted(helped.adopted) == sorted(program.name for program in made.programs())
    assert [process.returncode is None for process in helped.processes] == [False, False]


def test_an_engine_runs_what_helpers_lowered(helped, monkeypatch):
    monkeypatch.setattr("jaxllm.loading.helpers_for", lambda devices: 2)
    monkeypatch.setattr("jaxllm.loading.cache_folder", lambda: None)
    with LLM(STORIES, dtype="float32", max_num_seqs=8) as llm, counted_compilations() as compilations:
        (output,) = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=30), use_tqdm=False)
    assert output.outputs[0].text.startswith(", there was a little girl named Lily.")
    assert compilations == []
    assert sum(name.startswith("step of") for name in helped.adopted) >= 5


ENDS = "import pickle, sys; pickle.load(sys.stdin.buffer); pickle.dump(0, sys.stdout.buffer); sys.stdout.flush()"
HELPERS = {"ends at once": "", "ends when it is asked": ENDS, "says what nobody understands": "print('hello')"}


def start(program: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.mark.parametrize("what", HELPERS)
def test_what_a_broken_helper_took_is_lowered_here(what, helped, monkeypatch, caplog):
    monkeypatch.setattr(lowering, "_start", lambda: start(HELPERS[what]))
    made = short()
    assert texts(made, helpers=2).keys() == {program.name for program in made.programs()}
    assert caplog.text.count("a helper ended too early") == 2


def test_a_silent_helper_is_given_up(monkeypatch, caplog):
    silent = start(f"{ENDS}; import time; time.sleep(600)")
    monkeypatch.setattr(lowering, "_start", lambda: silent)
    monkeypatch.setattr(lowering, "PATIENCE_S", 0.1)
    made = short()
    assert texts(made, helpers=1).keys() == {program.name for program in made.programs()}
    assert "no helper has lowered anything" in caplog.text and silent.returncode is not None


def test_programs_made_from_something_else_are_not_taken(helped, caplog):
    made = recipe()
    other = dataclasses.replace(made, plan=dataclasses.replace(made.plan, num_pages=7))
    found = {program.name: done.as_text() for program, done in lowered(made.programs(), {}, other, 1)}
    assert found == alone(1)
    assert f"step of {LANES} rows and 16 prompt tokens was lowered for" in caplog.text
    assert "masks" in helped.adopted and f"step of {LANES} rows and 16 prompt tokens" not in helped.adopted


def test_a_program_that_cannot_be_lowered_fails_here(helped, caplog):
    made = dataclasses.replace(recipe(), implementation="sm90")
    with pytest.raises(NotImplementedError, match="cannot take"):
        texts(made, helpers=1)
    assert "a helper could not lower step of" in caplog.text
    assert helped.processes[0].returncode is not None


def test_a_helper_ends_with_the_process_that_asked():
    helper = lowering._start()
    assert helper.stdin is not None and lowering._ask(helper, recipe().described()) == "ready"
    helper.stdin.close()
    assert helper.wait(20) == 0
    assert helper.stdout is not None
    helper.stdout.close()


def test_devices_that_cannot_be_described_cost_a_warning(monkeypatch, caplog):
    def fails(self):
        raise NotImplementedError("no description")

    monkeypatch.setattr(Recipe, "described", fails)
    made = short()
    assert texts(made, helpers=2).keys() == {program.name for program in made.programs()}
    assert "0 of 2 helpers could be started (no description)" in caplog.text


def test_a_description_that_lost_something_is_refused():
    settings, topology, facts, *rest = pickle.loads(recipe().described())
    lost = pickle.dumps((settings, topology, [(*facts[0][:-1], 132)], *rest))
    with pytest.raises(ValueError, match=r"132.* but their description says"):
        Recipe.read(lost)


def test_only_a_gpu_is_worth_helpers(monkeypatch):
    gpu = SimpleNamespace(platform="gpu")
    assert helpers_for(jax.devices()) == 0
    for cores, wanted in ((1, 0), (4, 2), (64, MOST)):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        assert helpers_for([gpu]) == wanted


def test_few_programs_are_lowered_here(monkeypatch):
    monkeypatch.setattr(lowering, "_start", lambda: pytest.fail("a helper was started"))
    made = recipe()
    todo = made.programs()[: lowering.EACH - 1]
    assert len(list(lowered(todo, {}, made, helpers=8))) == len(todo)


def test_this_process_begins_with_the_quick_ones(monkeypatch):
    """Where there are helpers, which begin with the slow ones; alone it keeps the order."""
    monkeypatch.setattr(lowering._Work, "_drive", lambda self, process, described: process.communicate())
    monkeypatch.setattr(lowering, "_start", lambda: start(""))
    made = recipe()
    names = [program.name for program in made.programs()]
    assert [program.name for program, _ in lowered(made.programs(), {}, made, helpers=1)] == names[::-1]
    assert [program.name for program, _ in lowered(made.programs(), {}, made, helpers=0)] == names
