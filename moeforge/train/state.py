"""The state of an unfinished training run in one safetensors file, written whole or not at all. Nothing is pickled."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from ..errors import BadInput

META = "moeforge"


def save_state(
    path: Path, tensors: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer | None, meta: dict[str, Any]
) -> None:
    """Write tensors, the optimizer's state (its groups hold `names`) and `meta` (JSON-able), by fsync and rename.

    Args:
        optimizer: None once it has nothing more to do.

    Raises:
        OSError: there is no room; nothing of the file is left behind.
    """
    body = dict(tensors)
    scalars: dict[str, dict[str, Any]] = {}
    states = [] if optimizer is None else [(name, optimizer.state.get(param, {})) for name, param in _params(optimizer)]
    for name, state in states:
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                body[f"optimizer/{name}/{key}"] = value
            else:
                scalars.setdefault(name, {})[key] = value
    body["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        body["rng/cuda"] = torch.cuda.get_rng_state()
    half = path.with_name(path.name + ".half")
    try:
        _write(half, _apart(body), {META: json.dumps({**meta, "scalars": scalars})})
        os.replace(half, path)
    except OSError:
        half.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@torch.no_grad()
def load_state(path: Path, tensors: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Fill `tensors` in place, the optimizer and the random generators; returns the meta that was saved.

    Raises:
        BadInput: the file belongs to another run.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        meta = json.loads((file.metadata() or {}).get(META, "{}"))
        keys = set(file.keys())
        missing = [name for name in tensors if name not in keys]
        if missing or "scalars" not in meta:
            raise BadInput(
                f"{path}: not the state of this run ({len(missing)} tensors missing); delete it to start anew"
            )
        for name, tensor in tensors.items():
            tensor.copy_(file.get_tensor(name))
        for name, param in _params(optimizer):
            prefix = f"optimizer/{name}/"
            state: dict[str, Any] = dict(meta["scalars"].get(name, {}))
            for key in (key for key in keys if key.startswith(prefix)):
                value = file.get_tensor(key)
                # AdamW keeps its step counter on the CPU unless it is fused there
                state[key.removeprefix(prefix)] = value if value.ndim == 0 else value.to(param.device)
            if state:
                optimizer.state[param] = state
        torch.set_rng_state(file.get_tensor("rng/cpu"))
        if "rng/cuda" in keys and torch.cuda.is_available():
            torch.cuda.set_rng_state(file.get_tensor("rng/cuda"))
    return meta


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # what the disk says comes as text
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), str(error), str(path)) from error
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """No two in one piece of memory, which safetensors refuses: 8-bit optimizers share a table of levels."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        held = tensor.detach().contiguous()
        if held.numel() and held.data_ptr() in seen:
            held = held.clone()
        seen.add(held.data_ptr())
        apart[name] = held
    return apart


def _params(optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.Tensor]]:
    return [pair for group in optimizer.param_groups for pair in zip(group["names"], group["params"], strict=True)]
