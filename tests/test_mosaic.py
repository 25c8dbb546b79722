"""Kernels of Mosaic are found in a lowered program, and compiled before any program that holds them."""

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


def test_each_kernel_of_a_program_is_a_program_of_its_own():
    """Once, however often it is called, and also from within a jit; with what it takes and gives, and nothing else."""
    found = mosaic.kernels(lowered("one", "two", "one", outputs=2), jax.devices()[0])
    assert found.keys() == {b"one", b"two"}
    for name, done in found.items():
        text = done.as_text()
        assert text.count("custom_call") == 1 and f'module = "text of {name.decode()}"' in text
        assert "(tensor<2x3xbf16>) -> (tensor<2x3xf32>, tensor<2x3xf32>)" in text
        assert "sine" not in text and "add" not in text


def test_a_program_without_kernels_has_none():
    assert mosaic.kernels(lowered(), jax.devices()[0]) == {}


def test_a_kernel_alone_is_a_program_that_compiles(monkeypatch):
    """With another call in its place, of which XLA makes nothing: what it is given comes back."""
    monkeypatch.setattr(mosaic, "CALL", "Sharding")
    x = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
    [alone] = mosaic.kernels(jax.jit(lambda x: jnp.sin(kernel(x + 1, "same")[0])).lower(x), jax.devices()[0]).values()
    [found] = alone.compile()(x)
    np.testing.assert_array_equal(found, x)


def test_a_kernel_of_unknown_types_is_left_to_its_program():
    done = jax.jit(lambda x: kernel(x, "odd")[0]).lower(jnp.ones((2, 3), jnp.int8))
    assert mosaic.kernels(done, jax.devices()[0]) == {}


def test_kernels_come_before_programs_that_hold_them_and_after_the_others(monkeypatch):
    """The programs without them are compiled as they come; then each kernel once; and nothing that holds one before the last is done."""
    began: list[str] = []
    ended: list[str] = []

    def compiled(name, done):
        began.append(name)
        if name.startswith("kernel"):
            assert {"draw", "masks"} <= set(ended)
        if name.startswith("step"):
            assert {"kernel 0", "kernel 1", "kernel 2"} <= set(ended)
        ended.append(name)
        return f"{name} compiled"

    monkeypatch.setattr(runner, "_compile", compiled)
    names = {"step a": ("one", "two"), "draw": (), "step b": ("two", "three"), "masks": ()}
    programs: Any = [(SimpleNamespace(name=name), lowered(*texts)) for name, texts in names.items()]
    with ThreadPoolExecutor(4) as pool:
        made = runner._made(pool, programs, jax.devices()[0])
    assert made == {name: f"{name} compiled" for name in names}
    assert sorted(began) == sorted([*names, "kernel 0", "kernel 1", "kernel 2"])
