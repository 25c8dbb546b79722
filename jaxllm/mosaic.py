"""Mosaic's kernels of a lowered program, as programs of their own, to be compiled before it.

LLVM has one set of command line options a process. Mosaic wants others for it than XLA, so a lock lets many compilations of one kind run
at a time, but none of the other kind meanwhile (`LLVMCommandLineOptionsLock`, in jaxlib's mosaic/gpu/custom_call.cc). Programs that hold
kernels, compiled side by side, therefore stop each other at every kernel. A process keeps the kernels that it has compiled, by a hash of
their text: compiled before any program, they are only looked up.
"""

import io
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import func
from jax.stages import Lowered

from jaxllm.lowering import with_text

CALL = "mosaic_gpu_v2"
TYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "i32": "int32", "f8E4M3FN": "float8_e4m3fn"}


def kernels(done: Lowered, device: Any) -> dict[bytes, Lowered]:
    """By the hash of its text, each of Mosaic's kernels in a lowered program as a program, for one device, that holds nothing else.

    A kernel with numbers of other than TYPES is left out, and compiled with what holds it.
    """
    calls: dict[bytes, Any] = {}

    def look(op: Any) -> Any:
        if op.name == "stablehlo.custom_call" and ir.StringAttr(op.attributes["call_target_name"]).value == CALL:
            calls[ir.StringAttr(ir.DictAttr(op.attributes["mhlo.backend_config"])["kernel_hash"]).value_bytes] = op
        return ir.WalkResult.ADVANCE

    text: Any = done.compiler_ir("stablehlo")
    text.operation.walk(look)
    return {name: _alone(call, device) for name, call in calls.items() if _types(call.operands, call.results) <= TYPES.keys()}


def _alone(call: Any, device: Any) -> Lowered:
    place, out = jax.sharding.SingleDeviceSharding(device), _shapes(call.results)
    given = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place) for s in _shapes(call.operands)]
    stand_in = jax.jit(lambda *_: [jnp.zeros(s.shape, s.dtype) for s in out], keep_unused=True, out_shardings=place)
    text = io.BytesIO()
    _module(call).operation.write_bytecode(text)
    return with_text(stand_in.lower(*given), text.getvalue())


def _module(call: Any) -> Any:
    takes, gives = ([value.type for value in values] for values in (call.operands, call.results))
    with call.context, ir.Location.unknown():
        module = ir.Module.create()
        module.operation.attributes["sym_name"] = ir.StringAttr.get("kernel")
        with ir.InsertionPoint(module.body):
            main = func.FuncOp("main", (takes, gives))
        with ir.InsertionPoint(main.add_entry_block()):
            attributes = {name: call.attributes[name] for name in call.attributes}
            func.ReturnOp(ir.Operation.create(call.name, gives, list(main.arguments), attributes).results)
    return module


def _types(*values: Sequence[Any]) -> set[str]:
    return {str(ir.RankedTensorType(value.type).element_type) for each in values for value in each}


def _shapes(values: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    types = [ir.RankedTensorType(value.type) for value in values]
    return [jax.ShapeDtypeStruct(t.shape, TYPES[str(t.element_type)]) for t in types]
