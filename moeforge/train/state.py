"""The state of an unfinished training run in one safetensors file, written whole or not at all. Nothing in it is pickled, and
nothing in it depends on how many ranks shared the model: every tensor is whole, so any number of them may continue."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from ..errors import BadInput
from .ranks import Ranks

META = "moeforge"


def save_state(
    path: Path | None, tensors: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer | None, meta: dict[str, Any], ranks: Ranks
) -> None:  # fmt: skip
    """Write tensors, the optimizer's state (its groups hold `names`) and `meta` (JSON-able), by fsync and rename.

    Args:
        path: None on every rank but the first, which writes what all put together.
        optimizer: None once it has nothing more to do.

    Raises:
        OSError: there is no room; nothing of the file is left behind.
    """
    body = {name: ranks.gathered(tensor) for name, tensor in tensors.items()}
    scalars: dict[str, dict[str, Any]] = {}
    states = [] if optimizer is None else [(name, optimizer.state.get(param, {})) for name, param in _params(optimizer)]
    for name, state in states:
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                body[f"optimizer/{name}/{key}"] = ranks.gathered(value)
            else:
                scalars.setdefault(name, {})[key] = value
    if path is None:
        return
    body["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        body["rng/cuda"] = torch.cuda.get_rng_state()
    half = path.with_name(path.name + ".half")
    try:
        _write(
            half,
            _apart({name: value for name, value in body.items() if value is not None}),
            {META: json.dumps({**meta, "scalars": scalars})},
        )
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
def load_state(
    path: Path | None, tensors: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer, ranks: Ranks
) -> dict[str, Any]:
    """Fill `tensors` in place, the optimizer and the random generators; returns the meta that was saved.

    Args:
        path: None on every rank but the first, which reads for all.

    Raises:
        BadInput: the file belongs to another run.
    """
    with _Reader(path) as file:
        if path is not None:
            missing = [name for name in tensors if name not in file.keys]
            if missing or "scalars" not in file.meta:
                raise BadInput(
                    f"{path}: not the state of this run ({len(missing)} tensors missing); delete it to start anew"
                )
        meta, keys = ranks.share((file.meta, file.keys))
        for name, tensor in tensors.items():
            ranks.fill(tensor, file.read(name))
        for name, param in _params(optimizer):
            prefix = f"optimizer/{name}/"
            state: dict[str, Any] = dict(meta["scalars"].get(name, {}))
            for key in (key for key in keys if key.startswith(prefix)):
                state[key.removeprefix(prefix)] = ranks.received(file.read(key), param)
            if state:
                optimizer.state[param] = state
        random = {kind: ranks.share(file.read(f"rng/{kind}")) for kind in ("cpu", "cuda") if f"rng/{kind}" in keys}
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["cuda"])
    return meta


class _Reader:
    """A state's tensors, one by one; on a rank that has no file, None for each."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.meta: dict[str, Any] = {}
        self.keys: list[str] = []

    def __enter__(self) -> _Reader:
        from safetensors import safe_open

        self.file: Any = None
        if self.path is not None:
            self.file = safe_open(self.path, "pt").__enter__()
            self.meta = json.loads((self.file.metadata() or {}).get(META, "{}"))
            self.keys = sorted(self.file.keys())
        return self

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            self.file.__exit__(*error)

    def read(self, name: str) -> Any:
        return None if self.file is None else self.file.get_tensor(name)


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
