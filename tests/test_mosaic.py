"""Kernels of Mosaic are found in lowered programs, and compiled before any program that holds them."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import mosaic, runner


def kernel(x: jax.Array, text: str, outputs: int = 1) -> Any:
    """What stands for a kernel in a program: a call of Mosaic's, which on a CPU can be lowered and no more."""
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32)] * outputs
    return jax.ffi.ffi_call(mosaic.CALL, shapes)(x, kernel_hash=text, module=f"text of {text}")


def lowered(*texts: str, outputs: int = 1) -> Any:
    def plain(x, text):
        return kernel(x, text, outputs)

    def program(x):
        inner = jax.jit(plain, static_argnums=1)
        return [jnp.sin(part) for i, text in enumerate(texts) for part in (inner if i % 2 else plain)(x + i, text)]

    return jax.jit(program).lower(jnp.ones((2, 3), jnp.bfloat16))


def test_each_kernel_of_a_program_is_found():
    """Once, however often it is called, and also from within a jit; with what it takes and gives."""
    found = mosaic.kernels(lowered("one", "two", "one", outputs=2))
    assert found.keys() == {b"one", b"two"}
    for kernel in found.values():
        assert [(s.shape, s.dtype) for s in kernel.takes] == [((2, 3), jnp.bfloat16)]
        assert [(s.shape, s.dtype) for s in kernel.gives] == [((2, 3), jnp.float32)] * 2


def test_a_program_of_kernels_calls_each_and_does_nothing_else():
    """What `kernels` finds in it is what it was made of, text for text."""
    found = mosaic.kernels(lowered("one", "two", "three", outputs=2))
    done = mosaic.program(list(found.values()), jax.devices()[0])
    text = done.as_text()
    assert text.count("custom_call") == 3 and "sine" not in text and "add" not in text
    for name in found:
        assert f'module = "text of {name.decode()}"' in text
    assert mosaic.kernels(done).keys() == found.keys()


def test_a_program_without_kernels_has_none():
    assert mosaic.kernels(lowered()) == {}


def test_a_program_of_kernels_compiles(monkeypatch):
    """With other calls in their place, of which XLA makes nothing: what they are given comes back, each its own."""
    monkeypatch.setattr(mosaic, "CALL", "Sharding")
    x = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
    done = jax.jit(lambda x: jnp.sin(kernel(x + 1, "same")[0]) + kernel(x, "other")[0]).lower(x)
    found = mosaic.program(list(mosaic.kernels(done).values()), jax.devices()[0]).compile()(x, 2 * x)
    np.testing.assert_array_equal(found, [x, 2 * x])


def test_a_kernel_of_unknown_types_is_left_to_its_program():
    done = jax.jit(lambda x: kernel(x, "odd")[0]).lower(jnp.ones((2, 3), jnp.int8))
    assert mosaic.kernels(done) == {}


def test_shares_will_take_about_as_long():
    """The longest texts apart, the short ones where there is least; none is lost, and there is none without a kernel."""
    made = [mosaic.Kernel(b"." * size, (), ()) for size in (1, 9, 2, 5, 4, 3)]
    shares = mosaic.shares(made, 3)
    assert sorted(sum(len(kernel.text) for kernel in share) for share in shares) == [7, 8, 9]
    assert sorted(len(kernel.text) for share in shares for kernel in share) == [1, 2, 3, 4, 5, 9]
    assert [len(share) for share in mosaic.shares(made[:2], 3)] == [1, 1]


def test_kernels_come_before_programs_that_hold_them_and_after_the_others(monkeypatch):
    """The programs without them are compiled as they come; then each kernel once; and nothing that holds one before the last is done."""
    began: list[str] = []
    ended: list[str] = []

    def compiled(name, done):
        began.append(name)
        if name.startswith("kernels"):
            assert {"draw", "masks"} <= set(ended)
        if name.startswith("step"):
            assert {"kernels 0", "kernels 1"} <= set(ended)
        ended.append(name)
        return f"{name} compiled"

    monkeypatch.setattr(runner, "_compile", compiled)
    monkeypatch.setattr(runner.os, "cpu_count", lambda: 2)
    names = {"step a": ("one", "two"), "draw": (), "step b": ("two", "three"), "masks": ()}
    programs: Any = [(SimpleNamespace(name=name), lowered(*texts)) for name, texts in names.items()]
    with ThreadPoolExecutor(4) as pool:
        made = runner._made(pool, programs, jax.devices()[0])
    assert made == {name: f"{name} compiled" for name in names}
    assert sorted(began) == sorted([*names, "kernels 0", "kernels 1"])
