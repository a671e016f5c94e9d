"""Tensors that stay in their file until they are used."""

from __future__ import annotations

import pathlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import CheckpointError
from . import files


class StoredTensor(Tensor):
    """A tensor of a safetensors file, on the CPU: read anew by each operation that uses it, and then let go."""

    path: pathlib.Path
    version: tuple[int, int]
    key: str

    @staticmethod
    def __new__(cls, path: pathlib.Path, key: str, dtype: torch.dtype, shape: list[int]) -> StoredTensor:
        stored = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        stored.path, stored.version, stored.key = path, _version(path), key
        return stored

    def read(self) -> Tensor:
        """The tensor, a view of the file, which is opened for it alone: pages stay in memory while one is open.

        Raises:
            CheckpointError: the file cannot be read, or is another one by now.
        """
        with files.reading(self.path) as file:
            tensor = file.get_tensor(self.key)
        if _version(self.path) != self.version:
            raise CheckpointError(f"{self.path} was replaced while it was loaded.", fix="load it again")
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map(lambda x: x.read() if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*args, **kwargs)


def _version(path: pathlib.Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def stored_tensors(path: files.Path) -> dict[str, Tensor]:
    """What a safetensors file holds, by name; nothing but its header is read yet.

    Raises:
        CheckpointError: it cannot be read, is none, or holds a dtype that no checkpoint of pi0 has.
    """
    path = pathlib.Path(path)
    with files.reading(path) as file:
        pieces = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if foreign := [name for name, piece in pieces.items() if piece.get_dtype() not in files.TORCH_DTYPES]:
        raise CheckpointError(f"{path} holds tensors of a dtype that no checkpoint of pi0 has.", found=foreign[0])
    return {
        name: StoredTensor(path, name, files.TORCH_DTYPES[piece.get_dtype()], piece.get_shape())
        for name, piece in pieces.items()
    }
