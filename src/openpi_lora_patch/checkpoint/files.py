"""Files written whole or not at all, and safetensors files read and written one tensor at a time."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError

Path = str | os.PathLike[str]
Spec = tuple[torch.dtype, tuple[int, ...]]

# The names that the safetensors format has for what checkpoints of pi0 hold.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary name to write a file under; it takes the place of `path` when the block ends without an error.

    Raises:
        CheckpointError: no permission, no space, no such folder.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} could not be written.", found=str(error), fix="check space and rights") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def creating(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary folder to fill; it becomes `folder`, which must not be there, when the block ends without an error.

    Raises:
        CheckpointError: `folder` exists, no permission, no space.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} is there already.", fix="give another folder, or remove it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"{folder} could not be made.", found=str(error), fix="check space and rights") from None
    try:
        yield temporary
        temporary.chmod(0o755)
        for path in (*temporary.rglob("*"), temporary):
            _sync(path)
        temporary.rename(folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} could not be written.", found=str(error), fix="check space and rights"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_space(path: pathlib.Path, size: int) -> None:
    """Raise `CheckpointError` where `size` bytes more would not fit beside `path`."""
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise CheckpointError(
            f"There is no space for {path}.", found=f"{free:,} bytes free", expected=f"{size:,} bytes"
        )


def write_tensors(
    path: pathlib.Path, specs: Mapping[str, Spec], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file with one tensor in memory at a time. Not atomic: `path` is to be a temporary name.

    Args:
        path: the file.
        specs: dtype and shape of each tensor, in the order of the file.
        tensors: names and tensors in that order.
        metadata: the file's metadata.

    Raises:
        CheckpointError: too little free space, or tensors that are not as `specs` says.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in specs.items():
        begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    require_space(path, end)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for (wanted, spec), (name, tensor) in zip(specs.items(), tensors, strict=True):
            if (wanted, spec) != (name, (tensor.dtype, tuple(tensor.shape))):
                raise CheckpointError("A tensor is not as planned.", found=f"{name} {tensor.dtype}", expected=wanted)
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Any]:
    """An open safetensors file.

    Raises:
        CheckpointError: it is not there, cut off, or no safetensors file.
    """
    try:
        file = safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read.",
            found=str(error),
            expected="a whole safetensors file",
            fix="check the path; copy the file again if it was cut off",
        ) from None
    with file:
        try:
            yield file
        except SafetensorError as error:  # A tensor of a kind that this torch does not have.
            raise CheckpointError(f"{path} holds a tensor that cannot be read.", found=str(error)) from None


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: it is not there, or holds none.
    """
    try:
        return parse_json(path.read_bytes(), f"{path}")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read.", found=str(error), expected="a JSON object") from None


def parse_json(text: str | bytes, source: str) -> dict[str, Any]:
    """The JSON object that `text`, found in `source`, holds.

    Raises:
        CheckpointError: it holds none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} cannot be read.", found=str(error), expected="a JSON object") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{source} holds no JSON object.", found=type(value).__name__)
    return value


def weights_file(path: Path) -> pathlib.Path:
    """A checkpoint's safetensors file: `path` itself, or `model.safetensors` in it."""
    path = pathlib.Path(path)
    return path / "model.safetensors" if path.is_dir() else path


def _sync(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
