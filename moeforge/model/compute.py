"""Where a model computes, and in which type: what --device and --dtype may say."""

from __future__ import annotations

import torch

from ..errors import BadInput, MachineLacks, UsageProblem
from .weights import torch_dtype


def check_compute(device: str, dtype: str | None) -> None:
    """Refuse a device or a type before anything is read for it.

    Args:
        device: as torch calls it: `cpu`, `cuda`, `cuda:1`, `mps`.
        dtype: a floating-point type such as `bfloat16`; None leaves the choice to the checkpoint.

    Raises:
        UsageProblem: there is no such device or type.
        MachineLacks: a device that this machine does not have, or that its torch was not built for.
    """
    if dtype is not None:
        try:
            torch_dtype(dtype)
        except BadInput as error:
            raise UsageProblem(f"--dtype {error}") from None
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type == "meta":  # on `meta` there are shapes and no values
        raise UsageProblem(f"--device {device!r} is no device of torch; use cpu, cuda, cuda:1 or mps")
    if wanted.type == "cpu":
        return
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None or found.type != wanted.type:
        others = "" if found is None else f" or --device {found.type}"
        raise MachineLacks(
            f"--device {device}: torch {torch.__version__} finds no {wanted.type} on this machine; use --device cpu{others}"
        )
    count = torch.accelerator.device_count()
    if (wanted.index or 0) >= count:
        raise MachineLacks(
            f"--device {device}: this machine has {found.type}:0 to {found.type}:{count - 1}; use one of them"
        )
