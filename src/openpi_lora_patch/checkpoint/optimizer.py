"""What openpi's training keeps beside the model, in files that run no code when they are read.

`optimizer.pt` is a safetensors file: tensors by "parameter.name" (`0.exp_avg`), `param_groups` as JSON in its metadata.
`metadata.pt` is JSON. They keep openpi's names because its script looks for these.
"""

from __future__ import annotations

import json
import pathlib
import pickletools
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import CheckpointError
from . import files

_GROUPS = "param_groups"


def save(value: Mapping[str, Any], path: files.Path) -> None:
    """Write an optimizer's state dict, whose state is tensors, or a run's metadata. Called as `torch.save` is."""
    path = pathlib.Path(path)
    if _GROUPS not in value:
        path.write_text(json.dumps(value, default=str, indent=1) + "\n")
        return
    tensors = {
        f"{index}.{name}": tensor.contiguous()
        for index, state in value["state"].items()
        for name, tensor in state.items()
    }
    save_file(tensors, path, {_GROUPS: json.dumps(value[_GROUPS])})


def load(path: files.Path, map_location: Any = "cpu", **_: Any) -> dict[str, Any]:
    """Read what `save` or `torch.save` wrote. Called as `torch.load` is; no code in a file is ever run.

    openpi's own `metadata.pt` holds its config as a pickle. Nothing of it is read: openpi then takes the step, which is
    all that it wants, from the folder's name.

    Raises:
        CheckpointError: it cannot be read, holds more than tensors, numbers and text, or would take more memory than it
            has bytes.
    """
    path = pathlib.Path(path)
    if not zipfile.is_zipfile(path):
        return files.read_json(path) if path.name == "metadata.pt" else _read(path, map_location)
    if path.name == "metadata.pt":
        return {}
    try:
        _refuse_bombs(path)
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read safely.", found=str(error).partition("\n")[0]) from None


def _refuse_bombs(path: pathlib.Path) -> None:
    """What torch takes for harmless: a call of `bytearray(length)`, and packed records, which it never writes."""
    with zipfile.ZipFile(path) as archive:
        if sum(record.file_size for record in archive.infolist()) > path.stat().st_size:
            raise ValueError("it unpacks to more bytes than it has")
        for name in (name for name in archive.namelist() if name.endswith("data.pkl")):
            called = {argument for code, argument, _ in pickletools.genops(archive.read(name)) if code.name == "GLOBAL"}
            if called & {"builtins bytearray", "__builtin__ bytearray"}:
                raise ValueError("it calls bytearray")


def _read(path: pathlib.Path, device: Any) -> dict[str, Any]:
    with files.reading(path) as file:
        text = (file.metadata() or {}).get(_GROUPS, "")
    state: dict[int, dict[str, Any]] = {}
    try:
        for key, tensor in load_file(path, device=str(device)).items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = tensor
        groups = json.loads(text)
        if not (isinstance(groups, list) and all(isinstance(group, dict) for group in groups)):
            raise ValueError(f"{_GROUPS} is no list of groups")
        return {"state": state, _GROUPS: groups}
    except (ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{path} holds no optimizer's state.", found=str(error)) from None
