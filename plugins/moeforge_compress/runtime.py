"""Run a compressed checkpoint: bitsandbytes' modules in place of linear layers, experts decoded one at a time."""

from __future__ import annotations

import inspect
from collections.abc import Container
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from moeforge.checkpoint.base import Checkpoint
from moeforge.checkpoint.quantized import Dequantized, wrap
from moeforge.errors import BadInput
from moeforge.model.build import build
from moeforge.model.load import assemble
from moeforge.model.weights import WeightMap, to_torch

from .codec import Codec, Parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ExpertStack(nn.Module):
    """Compressed experts of one projection, standing where the `[E, ...]` parameter stood.

    The stock experts' eager forward asks for `weight[e]`, expert by expert; that is the moment when expert e is decoded, so
    one expert at a time exists in 16 or 32 bits and routing stays transformers' own code.

    Args:
        codec: decodes the parts.
        blocks: one list for each block of rows (gate, then up), each with the parts of every expert in order.
        dtype: what experts are decoded to.
    """

    def __init__(self, codec: Codec, blocks: list[list[Parts]], dtype: torch.dtype) -> None:
        super().__init__()
        self._codec, self._dtype, self._experts = codec, dtype, len(blocks[0])
        self._headers: list[Parts] = []
        for i, experts in enumerate(blocks):
            stacked = {key: torch.stack([parts[key] for parts in experts]) for key in experts[0]}
            self._headers.append({key: stacked.pop(key) for key in list(stacked) if key in codec.headers})
            for key, value in stacked.items():
                # float32 scales lie as integers, so that `model.to(bfloat16)` cannot round them
                self.register_buffer(f"{key}_{i}", value.view(torch.int32) if value.is_floating_point() else value)

    def __getitem__(self, index: int | torch.Tensor) -> torch.Tensor:
        """Expert `index`, decoded: [out, in]."""
        expert = int(index)
        blocks = [{key: value[expert] for key, value in headers.items()} for headers in self._headers]
        for name, value in self.named_buffers():
            key, _, block = name.rpartition("_")
            blocks[int(block)][key] = value[expert].view(torch.float32) if value.dtype == torch.int32 else value[expert]
        decoded = [self._codec.decode(parts, self._dtype) for parts in blocks]
        return decoded[0] if len(decoded) == 1 else torch.cat(decoded)

    def __len__(self) -> int:
        return self._experts


class CodedLinear(nn.Module):
    """A linear layer whose matrix is decoded at each call, for shapes that bitsandbytes' own module cannot run.

    Args:
        parts: of the matrix [out, in].
        like: the layer it replaces; its bias is kept.
    """

    def __init__(self, codec: Codec, parts: Parts, like: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = like.in_features, like.out_features, like.bias
        self.stack = ExpertStack(codec, [[parts]], dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.stack[0]
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        return nn.functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


@dataclass(frozen=True)
class _Reader:
    """The stored tensors of compressed matrices, on the device that will decode them."""

    checkpoint: Dequantized
    codec: Codec
    device: str | torch.device

    def matrix(self, name: str) -> Parts:
        parts = self.checkpoint.coded[name].parts
        loaded = {role: to_torch(self.checkpoint.inner.read(stored)) for role, stored in parts.items()}
        return {role: part if role in self.codec.headers else part.to(self.device) for role, part in loaded.items()}

    def experts(self, names: list[str]) -> list[Parts]:
        """The parts of every expert, whether they are stored one by one or fused."""
        if len(self.checkpoint.tensors[names[0]].shape) == 3:
            return self.codec.split(self.matrix(names[0]))
        return [self.matrix(name) for name in names]


@dataclass(frozen=True)
class _Site:
    """A parameter that is compressed.

    Attributes:
        path, leaf: its module and its name there.
        blocks: the tensors that make it (see :meth:`WeightMap.sources`).
    """

    path: str
    leaf: str
    blocks: list[list[str]]


def _sites(model: PreTrainedModel, weights: WeightMap, compressed: Container[str]) -> tuple[list[_Site], list[str]]:
    """Every compressed parameter, and the names of all others.

    Raises:
        BadInput: a compressed tensor belongs to a module that cannot run it.
    """
    sites, plain = [], []
    for name in weights.names():
        blocks = weights.sources(name)
        found = {source in compressed for block in blocks for source in block}
        if found <= {False}:
            plain.append(name)
            continue
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        kind = type(owner).__name__
        if found != {True}:
            raise BadInput(f"{weights.checkpoint.ref}: {name} would be made of compressed and uncompressed tensors")
        if owner.get_parameter(leaf).ndim == 3:
            if f"self.{leaf}[" not in inspect.getsource(inspect.unwrap(type(owner).forward)):
                raise BadInput(f"{weights.checkpoint.ref}: {kind} uses its experts all at once ({name}), so that they cannot be decoded one by one")  # fmt: skip
        elif type(owner) is not nn.Linear or leaf != "weight":
            raise BadInput(
                f"{weights.checkpoint.ref}: {name} belongs to a {kind}, which bitsandbytes has no counterpart of"
            )
        sites.append(_Site(path, leaf, blocks))
    return sites, plain


def check(checkpoint: Checkpoint, names: Container[str]) -> None:
    """Make sure, before anything is written, that a checkpoint with these matrices compressed will load and run.

    Raises:
        BadInput: it will not; names the tensor and the module.
    """
    model = build(checkpoint.config)
    _sites(model, WeightMap(checkpoint, model), names)


def load_model(
    codec: Codec,
    checkpoint: Checkpoint,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attention: str | None = None,
) -> PreTrainedModel:
    """The model of a compressed checkpoint, its weights as small in memory as on disk.

    Args:
        dtype: of activations and of what was left uncompressed; default: the config's.

    Raises:
        BadInput: a compressed tensor belongs to a module that cannot run it; nothing is decoded in silence instead.
    """
    # seen as the checkpoint it was made from, so that names and shapes are matched as for any other
    decoded = wrap(checkpoint, dequantize=True)
    assert isinstance(decoded, Dequantized)
    read = _Reader(decoded, codec, device)

    def replace(model: PreTrainedModel, weights: WeightMap, dtype: torch.dtype) -> list[str]:
        sites, plain = _sites(model, weights, decoded.coded)
        for site in sites:
            owner = model.get_submodule(site.path)
            if isinstance(owner, nn.Linear):
                parts = read.matrix(site.blocks[0][0])
                made = codec.linear(parts, owner, dtype) or CodedLinear(codec, parts, owner, dtype)
                model.set_submodule(site.path, made)
            else:
                stack = ExpertStack(codec, [read.experts(block) for block in site.blocks], dtype)
                del owner._parameters[site.leaf]
                setattr(owner, site.leaf, stack)
        if any(isinstance(getattr(model.get_submodule(site.path), site.leaf, None), ExpertStack) for site in sites):
            model.set_experts_implementation("eager")
        model.eval()  # new modules start in training mode, in which bitsandbytes computes otherwise
        return plain

    return assemble(decoded, dtype=dtype, device=device, attention=attention, replace=replace)
