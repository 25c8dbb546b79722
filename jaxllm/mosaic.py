"""Mosaic's kernels of lowered programs, in programs of their own, to be compiled before those.

LLVM has one set of command line options a process. Mosaic wants others for it than XLA, so a lock lets many compilations of one kind run
at a time, but none of the other kind meanwhile (`LLVMCommandLineOptionsLock`, in jaxlib's mosaic/gpu/custom_call.cc). Programs that hold
kernels, compiled side by side, therefore stop each other at every kernel. A process keeps the kernels that it has compiled, by a hash of
their text: compiled before any program, they are only looked up. Even a program of nothing but a kernel has XLA's turn after Mosaic's, so
there are as many of them as threads, each with its share of the kernels: 63 of the 8B's, one a program, took turns of 16 that all
waited for their slowest, 9.5 s where 84 s of a core would have been 5.3.
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import func
from jax.stages import Lowered

from jaxllm.lowering import with_text

CALL = "mosaic_gpu_v2"
TYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "i32": "int32", "f8E4M3FN": "float8_e4m3fn"}


@dataclass(frozen=True)
class Kernel:
    """A call of one kernel, as a module whose main function does nothing else, in MLIR's bytecode; what it takes and gives."""

    text: bytes
    takes: tuple[jax.ShapeDtypeStruct, ...]
    gives: tuple[jax.ShapeDtypeStruct, ...]


def kernels(done: Lowered) -> dict[bytes, Kernel]:
    """By the hash of its text, each of Mosaic's kernels in a lowered program.

    A kernel with numbers of other than TYPES is left out, and compiled with what holds it.
    """
    calls: dict[bytes, Any] = {}

    def look(op: Any) -> Any:
        if op.name == "stablehlo.custom_call" and ir.StringAttr(op.attributes["call_target_name"]).value == CALL:
            calls[ir.StringAttr(ir.DictAttr(op.attributes["mhlo.backend_config"])["kernel_hash"]).value_bytes] = op
        return ir.WalkResult.ADVANCE

    text: Any = done.compiler_ir("stablehlo")
    text.operation.walk(look)
    return {name: _alone(call) for name, call in calls.items() if _types(call.operands, call.results) <= TYPES.keys()}


def shares(found: Iterable[Kernel], count: int) -> list[list[Kernel]]:
    """The kernels in at most so many shares that will take about as long: a longer text takes longer to compile."""
    made: list[list[Kernel]] = [[] for _ in range(count)]
    for kernel in sorted(found, key=lambda kernel: len(kernel.text), reverse=True):
        min(made, key=lambda share: sum(len(each.text) for each in share)).append(kernel)
    return [share for share in made if share]


def program(share: Sequence[Kernel], device: Any) -> Lowered:
    """A program for one device that calls each of these kernels, and does nothing else."""
    place = jax.sharding.SingleDeviceSharding(device)
    given = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place) for kernel in share for s in kernel.takes]
    out = [s for kernel in share for s in kernel.gives]
    stand_in = jax.jit(lambda *_: [jnp.zeros(s.shape, s.dtype) for s in out], keep_unused=True, out_shardings=place)
    made = stand_in.lower(*given)
    text: Any = made.compiler_ir("stablehlo")
    return with_text(made, _bytecode(_together(share, text.context)))


def _together(share: Sequence[Kernel], context: Any) -> Any:
    """One module, whose main function calls those of the kernels, one after the other."""
    with context, ir.Location.unknown():
        module, calls = _module(), []
        for i, kernel in enumerate(share):
            alone = ir.Module.parse(kernel.text)  # by a name: its operations end with it
            [called] = alone.body.operations
            called.attributes["sym_name"], called.attributes["sym_visibility"] = map(ir.StringAttr.get, (f"kernel_{i}", "private"))
            module.body.append(called)
            calls.append(called)
        takes, gives = ([t for called in calls for t in getattr(called.type, which)] for which in ("inputs", "results"))
        with ir.InsertionPoint(module.body):
            main = func.FuncOp("main", (takes, gives))
        with ir.InsertionPoint(main.add_entry_block()):
            given, results = iter(main.arguments), []
            for called in calls:
                results += func.CallOp(called, [next(given) for _ in called.type.inputs]).results
            func.ReturnOp(results)
    return module


def _alone(call: Any) -> Kernel:
    takes, gives = ([value.type for value in values] for values in (call.operands, call.results))
    with call.context, ir.Location.unknown():
        module = _module()
        with ir.InsertionPoint(module.body):
            main = func.FuncOp("main", (takes, gives))
        with ir.InsertionPoint(main.add_entry_block()):
            attributes = {name: call.attributes[name] for name in call.attributes}
            func.ReturnOp(ir.Operation.create(call.name, gives, list(main.arguments), attributes).results)
    return Kernel(_bytecode(module), _shapes(call.operands), _shapes(call.results))


def _module() -> Any:
    module = ir.Module.create()
    module.operation.attributes["sym_name"] = ir.StringAttr.get("kernels")
    return module


def _bytecode(module: Any) -> bytes:
    text = io.BytesIO()
    module.operation.write_bytecode(text)
    return text.getvalue()


def _types(*values: Sequence[Any]) -> set[str]:
    return {str(ir.RankedTensorType(value.type).element_type) for each in values for value in each}


def _shapes(values: Sequence[Any]) -> tuple[jax.ShapeDtypeStruct, ...]:
    types = [ir.RankedTensorType(value.type) for value in values]
    return tuple(jax.ShapeDtypeStruct(t.shape, TYPES[str(t.element_type)]) for t in types)
