"""Orbax checkpoints, read and written one tensor at a time. Needs tensorstore, and neither JAX nor Orbax."""

from __future__ import annotations

import importlib
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from . import files

_DTYPES = ("<f4", "<f2", "bfloat16")
_MOST_ELEMENTS = 2**32  # A header that lies takes no memory; openpi's largest tensor has 2**30.2.


class JaxCheckpoint:
    """The tensors of an Orbax checkpoint, read one at a time.

    Args:
        path: the checkpoint, or its `params` folder.

    Attributes:
        shapes: by name, "PaliGemma/llm/layers/attn/q_einsum/w".

    Raises:
        CheckpointError: no such checkpoint, one that cannot be read, or no tensorstore.
    """

    def __init__(self, path: files.Path) -> None:
        folder = pathlib.Path(path)
        self._folder = (folder / "params" if (folder / "params").is_dir() else folder).resolve()
        self._tensorstore = _tensorstore()
        if not (self._folder / "manifest.ocdbt").exists():
            raise CheckpointError(f"{path} is no Orbax checkpoint.", expected="a folder with params/manifest.ocdbt")
        self._keys: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        try:
            store = self._tensorstore.KvStore.open(self._kvstore("")).result()
            for key in (key.decode() for key in store.list().result()):
                if key.endswith("/.zarray"):
                    self._add(key.removesuffix("/.zarray"), json.loads(store.read(key).result().value))
        except ValueError as error:
            raise CheckpointError(f"{path} cannot be read.", found=str(error)[:500]) from None

    def read(self, name: str) -> Tensor:
        """One tensor, in its own dtype."""
        try:
            spec = {"driver": "zarr", "kvstore": self._kvstore(self._keys[name] + "/")}
            array = self._tensorstore.open(spec).result().read().result()
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{name} cannot be read.", found=str(error)[:500]) from None
        if array.dtype.name == "bfloat16":  # numpy has it from a package that torch does not know
            return torch.from_numpy(array.view("uint16")).view(torch.bfloat16)
        return torch.from_numpy(array)

    def _kvstore(self, path: str) -> dict[str, str]:
        return _kvstore(self._folder, path)

    def _add(self, key: str, array: Any) -> None:
        _require_sane(key, array)
        # A checkpoint of a training state has ".value" behind each name.
        name = key.removeprefix("params.").removesuffix(".value").replace(".", "/")
        self._keys[name], self.shapes[name] = key, tuple(array["shape"])


def _require_sane(key: str, array: Any) -> None:
    shape = array.get("shape") if isinstance(array, dict) and array.get("dtype") in _DTYPES else None
    sizes = shape if isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape) else []
    if not sizes or math.prod(sizes) > _MOST_ELEMENTS:
        raise ValueError(f"{key} describes no tensor: {str(array)[:200]}")


def write(
    folder: pathlib.Path, specs: Mapping[str, files.Spec], pieces: Iterable[tuple[str, int | None, Tensor]]
) -> None:
    """Write a checkpoint that Orbax restores as `{"params": ...}`, one piece in memory at a time. Not atomic.

    Args:
        folder: an empty one, with a temporary name.
        specs: dtype and shape by name, "PaliGemma/llm/layers/attn/q_einsum/w".
        pieces: name, and a whole tensor with None, or the number of a layer and that layer (shape[1:]).

    Raises:
        CheckpointError: no tensorstore, too little free space, or a file system that refuses.
    """
    tensorstore = _tensorstore()
    files.require_space(folder, sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in specs.values()))
    try:
        arrays: dict[str, Any] = {}
        for name, layer, tensor in pieces:
            if name not in arrays:
                arrays[name] = _create(tensorstore, folder, name, specs[name], layered=layer is not None)
            array = arrays[name] if layer is None else arrays[name][layer]
            array.write(_numpy(tensor, tensorstore)).result()
    except ValueError as error:  # What tensorstore raises for a full disk too.
        raise CheckpointError(f"{folder} could not be written.", found=str(error)[:500]) from None
    (folder / "_METADATA").write_text(json.dumps(_metadata(specs)))


def _create(tensorstore: Any, folder: pathlib.Path, name: str, spec: files.Spec, *, layered: bool) -> Any:
    dtype, shape = spec
    dotted = f"params.{name.replace('/', '.')}/"
    return tensorstore.open(
        {"driver": "zarr", "kvstore": _kvstore(folder, dotted), "store_data_equal_to_fill_value": True},
        create=True,
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        chunk_layout=tensorstore.ChunkLayout(chunk_shape=(1, *shape[1:]) if layered else shape),
    ).result()


def _metadata(specs: Mapping[str, files.Spec]) -> dict[str, Any]:
    """The tree of Orbax's `_METADATA`; 2 is its number for a key of a dictionary."""
    paths = [("params", *name.split("/")) for name in specs]
    value = {"value_type": "np.ndarray", "skip_deserialize": False}
    tree = {
        str(path): {"key_metadata": [{"key": key, "key_type": 2} for key in path], "value_metadata": value}
        for path in paths
    }
    return {"tree_metadata": tree, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}


def _numpy(tensor: Tensor, tensorstore: Any) -> Any:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(tensorstore.bfloat16.numpy_dtype)
    return tensor.numpy()


def _kvstore(folder: pathlib.Path, path: str) -> dict[str, str]:
    return {"driver": "ocdbt", "base": f"file://{folder}/", "path": path}


def _tensorstore() -> Any:
    try:
        return importlib.import_module("tensorstore")
    except ImportError:
        raise CheckpointError("JAX checkpoints need tensorstore.", fix="pip install 'openpi-lora-patch[jax]'") from None
