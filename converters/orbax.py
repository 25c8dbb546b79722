"""Our converted checkpoint: a model folder whose tensors lie in an Orbax checkpoint, in `orbax/`, under our names and unfused.

Written once, restored straight to the devices of any mesh, each reading its own part. Uncompressed, because weights hardly
compress, and in chunks, so that a part can be read without the rest. Orbax brings JAX with it and is imported only where it is
used; what arrays are wanted where, the caller says.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .hub import SMALL
from .tensor import Index, Tensor

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

NAME = "orbax"
CHUNK_BYTES = 32 << 20


def convert(checkpoint: "Checkpoint", folder: Path, dtype: str) -> None:
    """Writes `checkpoint` to `folder` in `dtype`. What is of that type already is read as it is written; the rest fills memory."""
    everything = {name: tensor.read((slice(None),) * len(tensor.shape)) for name, tensor in checkpoint.tensors.items()}
    write(folder, checkpoint, {name: array.astype(np.dtype(dtype), copy=False) for name, array in everything.items()})


def write(folder: Path, checkpoint: "Checkpoint", tensors: Mapping[str, Any]) -> None:
    """Makes `folder` a model folder with the arrays `tensors`, and with `checkpoint`'s config and tokenizer.

    It has its `orbax/` only when everything is written. Raises FileExistsError if the folder holds a model already, ValueError
    unless the arrays are of one type and of the shapes that the config calls for.
    """
    import orbax.checkpoint as ocp

    from .checkpoint import check

    taken = [path.name for pattern in (NAME, "*.safetensors", "pytorch_model*.bin") for path in folder.glob(pattern)]
    if taken:
        raise FileExistsError(f"{folder} already holds a model ({taken[0]}); name another folder")
    check(tensors, checkpoint.config)
    dtypes = sorted({np.dtype(array.dtype).name for array in tensors.values()})
    if len(dtypes) > 1:
        raise ValueError(f"the tensors are {' and '.join(dtypes)}; cast them to one type")
    folder.mkdir(parents=True, exist_ok=True)
    for path in [path for pattern in SMALL for path in checkpoint.folder.glob(pattern)]:
        if not path.name.endswith(".index.json") and path.parent != folder:
            shutil.copyfile(path, folder / path.name)
    hf = {key: value for key, value in checkpoint.hf.items() if key != "torch_dtype"} | {"dtype": dtypes[0]}
    (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
    with _checkpointer() as orbax:
        how = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in tensors}
        orbax.save((folder / NAME).absolute(), args=ocp.args.PyTreeSave(dict(tensors), save_args=how))


def orbax_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder, to be read by rectangles like any other format's; `restore` is the quick way to have them all.

    Raises FileNotFoundError if it was not converted, ValueError if its checkpoint cannot be read.
    """
    if not (folder / NAME).is_dir():
        raise FileNotFoundError(f"{folder} has no {NAME}/; make such a folder with jaxllm convert")
    with _checkpointer() as orbax:
        try:
            found = orbax.metadata((folder / NAME).absolute()).item_metadata.tree
        except Exception as error:  # Orbax has no error of its own for this
            raise ValueError(f"{folder / NAME} is not an Orbax checkpoint, or was cut short: {error}") from error
    return {name: _tensor(folder, name, array.shape, np.dtype(array.dtype)) for name, array in found.items()}


def _tensor(folder: Path, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    def read(index: Index) -> np.ndarray:
        import orbax.checkpoint as ocp

        return _restore(folder, {name: 0}, {name: ocp.RestoreArgs(restore_type=np.ndarray)})[name][index]

    return Tensor(tuple(shape), dtype, read)


def restore(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays as `wanted` has them: jax.ShapeDtypeStructs with the sharding of each. All are read at once, cast as they are read."""
    import orbax.checkpoint as ocp

    return _restore(folder, dict(wanted), ocp.checkpoint_utils.construct_restore_args(dict(wanted)))


def _restore(folder: Path, item: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    args = ocp.args.PyTreeRestore(item, restore_args=how, partial_restore=True)
    with _checkpointer() as orbax:
        try:
            return orbax.restore((folder / NAME).absolute(), args=args)
        except Exception as error:  # as above: what TensorStore raises, and pages of it
            raise ValueError(f"{folder / NAME} cannot be read, convert the model again: {str(error)[:200]}") from error


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False))
