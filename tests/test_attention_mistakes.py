"""Mistakes planted in the kernels on purpose are caught: by the comparison with the oracle, or by Mosaic's interpreter."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from attention_oracle import check

from pallas_kernels import attention, attention_combine, attention_portable, attention_sm90_prefill, work
from pallas_kernels.shapes import FP8, Case, Heads

ALL = Case(Heads(4, 2, 16), (70, 37, 5, 130), (0, 20, 5, 0), page_size=16, window=20, softcap=5.0, sinks=True, pages=FP8, spare=2)
PLAIN = replace(ALL, window=None, softcap=None, sinks=False, pages=None, dtype="float32")


def with_options(name: str, **changes: Callable) -> dict[str, Any]:
    """`attention_portable`'s function by that name, called with options other than those it was given."""
    right = getattr(attention_portable, name)

    def wrong(*args, **options):
        return right(*args, **options | {key: change(options[key]) for key, change in changes.items()})

    return {name: wrong}


def forgetful(attended, s_RS, v_SH, unit, interpret):
    """An online softmax that does not shrink what it has summed when the peak rises."""
    _, sum_R, o_RH = attended
    attended = jnp.full_like(attended[0], attention_combine.LOW), jnp.zeros_like(sum_R), jnp.zeros_like(o_RH)
    peak_R, more_R, p_RH = RIGHT_ATTEND(attended, s_RS, v_SH, unit, interpret)
    return peak_R, sum_R + more_R, o_RH + p_RH


RIGHT_ATTEND = attention_portable._attend


def shorter(rows, **options):
    """Shares that forget the last block of the last worker."""
    right = work.shares(rows, **options)
    return replace(right, bound_W1=right.bound_W1.at[-1].add(-1))


class Changed:
    """A module, but for some of its names."""

    def __init__(self, module: Any, **changes: Any):
        self._module = module
        self.__dict__.update(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


MISTAKES: dict[str, tuple[Any, dict[str, Any], Case]] = {
    "decode's window is one too long": (attention_portable, with_options("decode", window=lambda w: w + 1), ALL),
    "prefill's window is one too short": (attention_portable, with_options("prefill", window=lambda w: w - 1), ALL),
    "decode has no softcap": (attention_portable, with_options("decode", softcap=lambda cap: None), ALL),
    "decode has no sinks": (attention_portable, with_options("decode", sinks_Q=lambda sinks: None), ALL),
    "prefill has its neighbours' sinks": (attention_portable, with_options("prefill", sinks_Q=lambda sinks: jnp.roll(sinks, 1)), ALL),
    "keys are read without their scale": (attention_portable, with_options("decode", k_scale_K=lambda scale: None), ALL),
    "values are read with the keys' scale": (attention_portable, with_options("prefill", v_scale_K=lambda scale: scale[::-1]), ALL),
    "fp8 numbers are twice as large": (attention_portable, {"WIDENED": 2.0**9}, ALL),
    "sums are not shrunk": (attention_portable, {"_attend": forgetful}, PLAIN),
    "the last block is nobody's": (attention, {"shares": shorter}, PLAIN),
    "every part weighs the same": (attention_combine, {"jnp": Changed(jnp, exp2=jnp.ones_like)}, PLAIN),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_comparison_catches(name, monkeypatch):
    module, changes, case = MISTAKES[name]
    for attribute, wrong in changes.items():
        monkeypatch.setattr(module, attribute, wrong)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(case, "portable", interpret=True)


@pytest.mark.parametrize("case", [ALL, PLAIN])
def test_without_a_mistake_there_is_nothing_to_catch(case):
    check(case, "portable", interpret=True)


# Two KV blocks, the older one cut by the window, the newer one with a tail that holds NaN; a second row and lanes that nobody owns.
SM90 = Case(Heads(2, 1, 64), (150, 9), (20, 9), page_size=16, window=60, softcap=5.0, spare=3)


def carries_on(options, mine, item, s_RS, peak_R, sum_R, edge):
    """Hopper's softmax, but for what has been summed before: it stays as it is when the peak rises."""
    new_R, sum_R, keep_R, p_RS = RIGHT_SOFTMAX(options, mine, item, s_RS, peak_R, sum_R, edge)
    return new_R, sum_R, jnp.ones_like(keep_R), p_RS


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
