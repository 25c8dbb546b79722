"""Executables kept between starts: what comes back runs, anything that decides them changes the file, and a bad file costs nothing."""

import pickle
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.executables import KEPT, Executables

ONE = jax.devices()[:1]


@dataclass(frozen=True)
class Sizes:
    parts: frozenset[str]
    width: float = 1.5


def compiled(factor: float):
    shape = jax.ShapeDtypeStruct((4,), jnp.float32)
    return jax.jit(lambda x, y: {"sum": x + factor * y, "y": y}, donate_argnums=1).lower(shape, shape).compile()


def test_what_was_kept_runs_again_without_compiling(tmp_path):
    first = Executables(tmp_path, ONE, Sizes(frozenset("abc")))
    assert first.get("double") is None
    first.keep({"double": compiled(2.0), "triple": compiled(3.0)})
    again = Executables(tmp_path, ONE, Sizes(frozenset("cba")))
    for name, factor in (("double", 2.0), ("triple", 3.0)):
        run = again.get(name)
        assert run is not None
        out = run(jnp.ones(4), jnp.arange(4.0))
        np.testing.assert_array_equal(out["sum"], 1 + factor * np.arange(4))
    assert again.get("quadruple") is None


@pytest.mark.parametrize("other", [(Sizes(frozenset("ab")), 8), (Sizes(frozenset("abc"), 2.0), 8), (Sizes(frozenset("abc")), 9)])
def test_anything_that_decides_them_makes_another_file(tmp_path, other):
    Executables(tmp_path, ONE, Sizes(frozenset("abc")), 8).keep({"double": compiled(2.0)})
    assert Executables(tmp_path, ONE, Sizes(frozenset("abc")), 8).get("double") is not None
    assert Executables(tmp_path, ONE, *other).get("double") is None


def test_so_do_settings_and_flags(tmp_path, monkeypatch):
    Executables(tmp_path, ONE).keep({"double": compiled(2.0)})
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    assert Executables(tmp_path, ONE).get("double") is None
    monkeypatch.undo()
    monkeypatch.setattr("jaxllm.executables._source", lambda: "edited")
    assert Executables(tmp_path, ONE).get("double") is None


def test_values_without_a_lasting_text_are_refused(tmp_path):
    with pytest.raises(TypeError, match="no text that stays the same"):
        Executables(tmp_path, ONE, object())


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x04N."])
def test_a_damaged_file_means_compiling_again(tmp_path, content, caplog):
    Executables(tmp_path, ONE, 1).keep({"double": compiled(2.0)})
    [path] = tmp_path.iterdir()
    path.write_bytes(content)
    damaged = Executables(tmp_path, ONE, 1)
    assert damaged.get("double") is None
    assert "compiling again" in caplog.text
    damaged.keep({"double": compiled(2.0)})
    assert Executables(tmp_path, ONE, 1).get("double") is not None


def test_what_the_device_refuses_is_compiled_again(tmp_path, caplog):
    made = {"double": compiled(2.0), "triple": compiled(3.0)}
    Executables(tmp_path, ONE, 1).keep(made)
    [path] = tmp_path.iterdir()
    kept = pickle.loads(path.read_bytes())
    payload, *trees = kept["triple"]
    path.write_bytes(pickle.dumps(kept | {"triple": (payload[: len(payload) // 2], *trees)}))
    again = Executables(tmp_path, ONE, 1)
    assert again.get("double") is not None and again.get("triple") is None
    assert "compiling it again" in caplog.text
    again.keep(made)
    assert Executables(tmp_path, ONE, 1).get("triple") is not None


def test_only_so_many_files_stay(tmp_path):
    made = {"double": compiled(2.0)}
    for number in range(KEPT + 2):
        Executables(tmp_path, ONE, number).keep(made)
    assert len(list(tmp_path.iterdir())) == KEPT


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").touch()
    Executables(tmp_path / "file" / "steps", ONE, 1).keep({"double": compiled(2.0)})
    assert "cannot be kept" in caplog.text


def test_without_a_folder_nothing_is_kept():
    none = Executables(None, ONE, 1)
    none.keep({"double": compiled(2.0)})
    assert none.get("double") is None
