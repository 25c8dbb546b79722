"""Mistakes planted in the kernels on purpose are caught: by the comparison with the oracle, or by Mosaic's interpreter."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from attention_oracle import check

from pallas_kernels import attention, attention_decode, attention_portable, attention_sm90_prefill, work
from pallas_kernels.shapes import FP8, Case, Heads

DECODES = Case(Heads(4, 2, 16), (70, 0, 5, 130), page_size=16, window=20, softcap=5.0, sinks=True, pages=FP8)
PROMPTS = replace(DECODES, lengths=(37, 5), chunk_lens=(20, 5), spare=2)
PLAIN = replace(DECODES, window=None, softcap=None, sinks=False, pages=None, dtype="float32")


@pytest.fixture(autouse=True)
def traced_anew():
    """The kernels' wrappers are jits: a trace that holds a mistake must not serve the next test, nor a right one this."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def with_options(module: Any, name: str, **changes: Callable) -> tuple[Any, dict[str, Any]]:
    """A module, and its function by that name called with options other than those it was given."""
    right = getattr(module, name)

    def wrong(*args, **options):
        return right(*args, **options | {key: change(options[key]) for key, change in changes.items()})

    return module, {name: wrong}


def forgetful(attended, s_RS, v_SH, unit, interpret):
    """An online softmax that does not shrink what it has summed when the peak rises."""
    _, sum_R, o_LRH = attended
    nothing = jnp.full_like(sum_R, attention_portable.LOW), jnp.zeros_like(sum_R), jax.tree.map(jnp.zeros_like, o_LRH)
    peak_R, more_R, p_LRH = RIGHT_ATTEND(nothing, s_RS, v_SH, unit, interpret)
    return peak_R, sum_R + more_R, jax.tree.map(jnp.add, o_LRH, p_LRH)


RIGHT_ATTEND = attention_decode._attend


def twice(ref, index, one):
    """An arrival that counts for two."""
    return RIGHT_ADD(ref, index, 2 * one)


RIGHT_ADD = attention_decode.plt.atomic_add


def early(entry, **numbers):
    """The worker before the one that holds an entry."""
    return jnp.maximum(RIGHT_WORKER(entry, **numbers) - 1, 0)


def greedy(options, refs, worker, at, opened, closes, attended):
    """What a worker has of a (row, head) goes out as if it were all."""
    return RIGHT_LEAVE(options, refs, worker, at, jnp.bool_(True), jnp.bool_(True), attended)


RIGHT_WORKER, RIGHT_LEAVE, RIGHT_PLANES = work.worker_of, attention_decode._leave, attention_decode._planes


def shorter(rows, **options):
    """Shares that forget the last block of the last worker."""
    right = work.shares(rows, **options)
    return replace(right, cut_WF=right.cut_WF.at[-1, work.CUT.index("entry")].add(-1))


class Changed:
    """A module, but for some of its names."""

    def __init__(self, module: Any, **changes: Any):
        self._module = module
        self.__dict__.update(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def decode(**changes: Callable) -> tuple[Any, dict[str, Any]]:
    return with_options(attention_decode, "decode", **changes)


def prefill(**changes: Callable) -> tuple[Any, dict[str, Any]]:
    return with_options(attention_portable, "prefill", **changes)


MISTAKES: dict[str, tuple[tuple[Any, dict[str, Any]], Case]] = {
    "decode's window is one too long": (decode(window=lambda w: w + 1), DECODES),
    "prefill's window is one too short": (prefill(window=lambda w: w - 1), PROMPTS),
    "decode has no softcap": (decode(softcap=lambda cap: None), DECODES),
    "decode has no sinks": (decode(sinks_Q=lambda sinks: None), DECODES),
    "prefill has its neighbours' sinks": (prefill(sinks_Q=lambda sinks: jnp.roll(sinks, 1)), PROMPTS),
    "keys are read without their scale": (decode(k_scale_K=lambda scale: None), DECODES),
    "values are read with the keys' scale": (prefill(v_scale_K=lambda scale: scale[::-1]), PROMPTS),
    "fp8 numbers are twice as large": ((attention_decode, {"WIDENED": 2.0**9}), DECODES),
    "even features are taken for odd ones": (
        (attention_decode, {"_planes": lambda x, interpret: RIGHT_PLANES(x, interpret)[::-1]}),
        DECODES,
    ),
    "sums are not shrunk": ((attention_decode, {"_attend": forgetful}), PLAIN),
    "the last block is nobody's": ((attention, {"shares": shorter}), PLAIN),
    "every part weighs the same": ((attention_decode, {"jnp": Changed(jnp, exp2=jnp.ones_like)}), PLAIN),
    "an arrival counts for two": ((attention_decode, {"plt": Changed(attention_decode.plt, atomic_add=twice)}), PLAIN),
    "a cut row is looked for among the wrong workers": ((work, {"worker_of": early}), PLAIN),
    "a row that is cut is written whole": ((attention_decode, {"_leave": greedy}), PLAIN),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_comparison_catches(name, monkeypatch):
    (module, changes), case = MISTAKES[name]
    for attribute, wrong in changes.items():
        monkeypatch.setattr(module, attribute, wrong)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(case, "portable", interpret=True)


@pytest.mark.parametrize("case", [DECODES, PROMPTS, PLAIN])
def test_without_a_mistake_there_is_nothing_to_catch(case):
    check(case, "portable", interpret=True)


def test_parts_that_a_thread_has_no_room_for_are_joined_in_more_turns(monkeypatch):
    monkeypatch.setattr(attention_decode, "JOINED", 0)  # one part a turn
    check(PLAIN, "portable", interpret=True)


# Two KV blocks, the older one cut by the window, the newer one with a tail that holds NaN; a second row and lanes that nobody owns.
SM90 = Case(Heads(2, 1, 64), (150, 9), (20, 9), page_size=16, window=60, softcap=5.0, spare=3)


def carries_on(options, mine, item, s_RS, peak_R, sum_RC, edge):
    """Hopper's softmax, but for what has been summed before: it stays as it is when the peak rises."""
    new_R, sum_RC, keep_R, p_RS = RIGHT_SOFTMAX(options, mine, item, s_RS, peak_R, sum_RC, edge)
    return new_R, sum_RC, jnp.ones_like(keep_R), p_RS


RIGHT_SOFTMAX = attention_sm90_prefill._softmax


def plgpu_without(name: str) -> dict[str, Any]:
    return {"plgpu": Changed(attention_sm90_prefill.plgpu, **{name: lambda *args, **options: None})}


def sm90_options(**changes: Any) -> dict[str, Any]:
    right = attention_sm90_prefill._Options
    return {"_Options": lambda *args: replace(right(*args), **changes)}


SM90_MISTAKES: dict[str, dict[str, Any]] = {
    "the window is one too long": sm90_options(window=61),
    "there is no softcap": sm90_options(softcap=None),
    "tokens see what comes after them": {"_masked": lambda options, mine, item, s_RS, block: s_RS},
    "outputs are not shrunk": {"_softmax": carries_on},
    "a row's tail is multiplied as it is": {"_clean_tail": lambda *args: None},
    "nobody waits": plgpu_without("barrier_wait"),
    "shared memory is not committed": plgpu_without("commit_smem"),
    "copies out are not awaited": plgpu_without("wait_smem_to_gmem"),
}


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the NaN of slots that nobody wrote
@pytest.mark.parametrize("name", SM90_MISTAKES)
def test_hoppers_prefill_is_caught_when(name, monkeypatch, capfd):
    """By the comparison; or by Mosaic's interpreter: a wrong state of a barrier, a read of what is not there, or a race."""
    for attribute, wrong in SM90_MISTAKES[name].items():
        monkeypatch.setattr(attention_sm90_prefill, attribute, wrong)
    try:
        check(SM90, "sm90", interpret=True)
    except jax.errors.JaxRuntimeError:
        return  # what the interpreter raises
    except AssertionError as error:
        assert "Not equal to tolerance" in str(error)
        return
    assert "RACE DETECTED" in capfd.readouterr().out


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_hoppers_prefill_is_right_without_a_mistake(capfd):
    check(SM90, "sm90", interpret=True)
    assert "RACE DETECTED" not in capfd.readouterr().out
