"""What --device and --dtype may say."""

from types import SimpleNamespace

import pytest
import torch

from moeforge.errors import MachineLacks, UsageProblem
from moeforge.model.compute import check_compute


def machine(monkeypatch, kind: str | None, count: int = 0) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: SimpleNamespace(type=kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


@pytest.mark.parametrize("device", ["foo", "", "cuda:x", "meta"])
def test_an_unknown_device_is_a_usage_problem(device):
    with pytest.raises(UsageProblem, match=f"--device '{device}' is no device"):
        check_compute(device, None)


@pytest.mark.parametrize("dtype", ["foo", "int8", "nn"])
def test_an_unknown_type_is_a_usage_problem(dtype):
    with pytest.raises(UsageProblem, match=f"--dtype '{dtype}' is not a floating-point type"):
        check_compute("cpu", dtype)


def test_what_the_machine_has_is_taken_and_what_it_lacks_is_not(monkeypatch):
    machine(monkeypatch, None)
    check_compute("cpu", "bfloat16")
    for device in ("cuda", "cuda:1", "mps"):
        with pytest.raises(MachineLacks, match=rf"--device {device}: .* on this machine; use --device cpu$"):
            check_compute(device, None)
    machine(monkeypatch, "cuda", 2)
    for device in ("cpu", "cuda", "cuda:0", "cuda:1"):
        check_compute(device, None)
    with pytest.raises(MachineLacks, match="cuda:0 to cuda:1"):
        check_compute("cuda:2", None)
    with pytest.raises(MachineLacks, match="no mps on this machine; use --device cpu or --device cuda"):
        check_compute("mps", None)
