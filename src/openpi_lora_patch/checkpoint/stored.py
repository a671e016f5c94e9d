"""Tensors that stay in their file until they are used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import CheckpointError
from . import files


class StoredTensor(Tensor):
    """A tensor of a safetensors file, on the CPU: read anew by each operation that uses it, and then let go."""

    path: files.Path
    key: str

    @staticmethod
    def __new__(cls, path: files.Path, key: str, dtype: torch.dtype, shape: list[int]) -> StoredTensor:
        stored = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        stored.path, stored.key = path, key
        return stored

    def read(self) -> Tensor:
        """The tensor, a view of the file, which is opened for it alone: pages stay in memory while one is open."""
        with files.reading(self.path) as file:
            return file.get_tensor(self.key)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map(lambda x: x.read() if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*args, **kwargs)


def stored_tensors(path: files.Path) -> dict[str, Tensor]:
    """What a safetensors file holds, by name; nothing but its header is read yet.

    Raises:
        CheckpointError: it cannot be read, is none, or holds a dtype that no checkpoint of pi0 has.
    """
    with files.reading(path) as file:
        pieces = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if foreign := [name for name, piece in pieces.items() if piece.get_dtype() not in files.TORCH_DTYPES]:
        raise CheckpointError(f"{path} holds tensors of a dtype that no checkpoint of pi0 has.", found=foreign[0])
    return {
        name: StoredTensor(path, name, files.TORCH_DTYPES[piece.get_dtype()], piece.get_shape())
        for name, piece in pieces.items()
    }
