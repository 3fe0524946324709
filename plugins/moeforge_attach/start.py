"""The first values of an adapter: A random, B zero, routers as asked, what was imported as it is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from moeforge.checkpoint.adapter_layout import deciders, maps_of, root_of, stored_at
from moeforge.checkpoint.base import COMPRESSION
from moeforge.checkpoint.quantized import wrap
from moeforge.errors import BadInput
from moeforge.mixture.config import MixtureConfig
from moeforge.mixture.low_rank import LowRank
from moeforge.model.adapters import put, values_of
from moeforge.model.build import build
from moeforge.model.weights import to_torch

if TYPE_CHECKING:
    from .stage import Job

ITERATIONS = 15
"""Of the power method for a prototype."""


@dataclass(frozen=True)
class Started:
    """What is to be written.

    Attributes:
        values: name -> float32 values.
        entries: with what the plan left open (the FFN's width and activation) filled in.
    """

    values: dict[str, np.ndarray]
    entries: list[MixtureConfig]


@torch.no_grad()
def start(job: Job) -> Started:
    """Every tensor of the adapter.

    Raises:
        BadInput: the model that the config builds has other linear maps than the checkpoint's names say.
    """
    config = {key: value for key, value in job.base.config.items() if key not in (COMPRESSION, "quantization_config")}
    model: Any = build(config)
    own = put(model, job.entries, job.src.ref)
    shapes = {name: shape for item in own for name, shape in item.shapes().items()}
    if wrong := sorted(name for name in shapes.keys() | job.shapes.keys() if shapes.get(name) != job.shapes.get(name)):
        raise BadInput(f"{job.src.ref}: {wrong[0]}: planned as {job.shapes.get(wrong[0])}, {type(model).__name__} has {shapes.get(wrong[0])}; "
                       "please report this family")  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        for mount, (_, layer) in model.mixtures.items():
            # its own seed, so that a layer's values do not depend on which others have experts
            torch.manual_seed(
                int.from_bytes(hashlib.sha256(f"{job.options.seed} {mount}".encode()).digest()[:8], "little") >> 1
            )
            for module in (layer.experts, layer.router):
                for name, parameter in module.named_parameters(recurse=False):
                    setattr(
                        module, name, nn.Parameter(torch.empty(parameter.shape), requires_grad=parameter.requires_grad)
                    )
            layer.experts.reset_parameters(0.0)
            if hasattr(layer.router, "reset_parameters"):
                layer.router.reset_parameters()
                if job.options.router_init == "zero":
                    nn.init.zeros_(layer.router.weight)
    values = {name: value.contiguous() for name, value in values_of(model).items()}
    for name, make in (job.content.tensors if job.content else {}).items():
        values[name] = to_torch(make()).float()
    _magnitudes(job, values)
    if job.options.router_init == "prototypes":
        _prototypes(job, values)
    return Started({name: value.numpy() for name, value in values.items()}, list(model.config.mixtures))


def _magnitudes(job: Job, values: dict[str, torch.Tensor]) -> None:
    """m = ||W|| of every row, where nothing was imported."""
    brought = job.content.tensors if job.content else {}
    weights: dict[str, torch.Tensor] = {}
    for name in values:
        if not name.endswith("lora_magnitude_vector") or name in brought:
            continue
        dense = _dense_of(name)
        if dense not in weights:
            source = wrap(job.base, dequantize=True) if COMPRESSION in job.base.config else job.base
            weight = to_torch(source.read(f"{dense}.weight")).float()
            weights = {dense: weight if weight.shape[0] == values[name].shape[0] else weight.T}
        values[name] = weights[dense].norm(dim=1)


def _dense_of(name: str) -> str:
    """`a.experts.3.gate_proj.lora_magnitude_vector` -> `a.gate_proj`."""
    from moeforge.checkpoint.expert_names import dense_name

    return dense_name(name)[0].rpartition(".")[0]


def _prototypes(job: Job, values: dict[str, torch.Tensor]) -> None:
    """Router rows = the direction of inputs that each expert's s B A answers most (Arrow, arXiv:2405.11157), by the power method on
    s^2 A^T (B^T B) A without making B A. Its sign means nothing. Where sites share a router, the direction is that of their deltas
    one above the other, [s_q B_q A_q; s_k B_k A_k; ...]: the sum over sites of these products."""
    raw = [entry.as_json() for entry in job.entries]
    followed = deciders(raw, job.src.ref)
    readers: dict[str, list[tuple[str, MixtureConfig]]] = {}
    for entry, entry_raw in zip(job.entries, raw, strict=True):
        if entry.router.kind != "cosine":
            continue
        for layer in entry.layers:
            keeper = stored_at(entry_raw, followed.get((entry.site, layer)))
            at = root_of(maps_of(keeper, layer, job.maps, job.src.ref))
            readers.setdefault(at, []).extend(
                (one.path, entry) for one in maps_of(entry_raw, layer, job.maps, job.src.ref).values()
            )
    for at, sites in readers.items():
        weight = values[f"{at}.router.weight"]
        for e in range(sites[0][1].experts.count):
            weight[e] = _direction([_delta(values, path, entry, e) for path, entry in sites])


def _delta(
    values: dict[str, torch.Tensor], path: str, entry: MixtureConfig, e: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(A, B, s) of an expert at a linear map."""
    a, b = (values[f"{path}.experts.{e}.lora_{half}.weight"].double() for half in "AB")
    return a, b, LowRank.read(entry.experts).scale_of(entry.experts.count)[e]


def _direction(deltas: Sequence[tuple[torch.Tensor, torch.Tensor, float]]) -> torch.Tensor:
    """[D] of length 1: what the deltas (A [r, D], B [D', r], s) together answer most."""
    grams = [(a, s * s * (b.T @ b)) for a, b, s in deltas]
    v = torch.randn(deltas[0][0].shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(ITERATIONS):
        v = torch.stack([a.T @ (gram @ (a @ v)) for a, gram in grams]).sum(0)
        v = v / v.norm().clamp_min(torch.finfo(v.dtype).tiny)
    return v.float()
