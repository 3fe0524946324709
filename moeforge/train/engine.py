"""transformers' own engine of many ranks: FSDP2, tensor and expert parallel through `DistributedConfig`.

The one file that knows it; nothing here dispatches a token, builds a mesh or defines a format. What the engine leaves to its user is
added: the layout is checked, experts that a plan did not reach are an error, losses are scaled as its gradients are divided, norms are
taken over two meshes, and the whole tensors that a resume on other ranks needs are put together and taken apart.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ..checkpoint.base import Checkpoint
from ..errors import BadInput, UsageProblem, one_line
from ..model.build import build, decoder_layers, head_of, parse_config
from ..model.weights import WeightMap
from .layout import ELSEWHERE, Layout
from .ranks import Ranks
from .routing import find_sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Sharded(Ranks):
    """Ranks that hold parts of a model which :func:`load_sharded` loaded."""

    def __init__(self, ranks: Ranks, model: PreTrainedModel, layout: Layout) -> None:
        super().__init__(ranks.index, ranks.size, ranks.device)
        # ranks of a tp group see the same rows; those of an ep group do not
        self.data_rank, self.data_size = ranks.index // layout.tp, layout.data
        self.scale = float(layout.data)
        meshes: Any = model._mesh_manager
        self._groups = [mesh.get_group() for mesh in map(meshes.get_mesh, ("dp_replicate", "fsdp")) if mesh.size() > 1]

    def _add(self, value: Tensor) -> None:
        for group in self._groups:
            dist.all_reduce(value, group=group)

    def complete(self, master: Tensor) -> None:
        gradient = master.grad
        # FSDP2 has summed it over rows; an embedding that is cut by words gets a whole one without FSDP2
        if isinstance(master, DTensor) and isinstance(gradient, DTensor) and gradient.placements != master.placements:
            master.grad = gradient.redistribute(placements=master.placements)

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        groups: dict[tuple[Any, tuple[int, ...]], list[Tensor]] = {}
        for tensor in tensors:
            # along an axis of copies every rank has the same, which counts once
            mesh, cut = (tensor.device_mesh, _cut(tensor)) if isinstance(tensor, DTensor) else (None, ())
            groups.setdefault((mesh, cut), []).append(_local(tensor))
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for (mesh, cut), parts in groups.items():
            square = super().norm(parts).to(squares).square()
            for axis in cut:
                dist.all_reduce(square, group=mesh.get_group(axis))
            squares += square
        return squares.sqrt()

    def scale_(self, tensors: Sequence[Tensor], factor: Tensor) -> None:
        # a DTensor and a plain tensor do not multiply, nor do tensors of two meshes
        super().scale_([_local(tensor) for tensor in tensors], factor)

    def gathered(self, tensor: Tensor) -> Tensor | None:
        whole = tensor.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        return whole.cpu() if self.main else None

    def part(self, whole: Tensor, like: Tensor) -> Tensor:
        whole = super().part(whole, like)
        if not isinstance(like, DTensor):
            return whole
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)

    def received(self, value: Tensor | None, like: Tensor) -> Tensor:
        whole = super().received(value, like)
        return self.part(whole, like) if whole.ndim else whole

    def settle(self, model: nn.Module) -> None:
        # what FSDP2 keeps whole until the backward pass would be taken for the parameters
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _cut(tensor: DTensor) -> tuple[int, ...]:
    """The axes of its mesh along which a tensor is cut."""
    return tuple(axis for axis, place in enumerate(tensor.placements) if not isinstance(place, Replicate))


def load_sharded(source: Checkpoint, layout: Layout, ranks: Ranks, *, short: bool) -> tuple[PreTrainedModel, Sharded]:
    """The causal language model of a directory or Hub repository, of which every rank reads and holds its part.

    Args:
        short: compute in bfloat16. With `layout.data` > 1 FSDP2 keeps float32 and rounds what it gathers; else the model is bfloat16.

    Raises:
        BadInput: transformers' engine does not do this for this model; says what does.
    """
    import transformers
    from transformers.distributed.configuration_utils import DistributedConfig

    skeleton = build(source.config)
    WeightMap(source, skeleton)  # strict, where from_pretrained only warns
    _check_plans(skeleton, layout, source.ref)
    config = DistributedConfig(
        tp_size=layout.tp, fsdp_size=layout.fsdp, ep_size=layout.ep, dp_replicate_size=layout.replicate,
        fsdp_mixed_precision=short and layout.data > 1,
    )  # fmt: skip
    name, revision = (str(source.root), None) if source.root is not None else source.ref.partition("@")[::2]
    auto = getattr(transformers, head_of(parse_config(source.config), source.config.get("architectures") or ()))
    with _quiet():
        try:
            model = auto.from_pretrained(
                name, revision=revision or "main", dtype=torch.bfloat16 if short and layout.data == 1 else torch.float32,
                distributed_config=config, use_safetensors=True,
            )  # fmt: skip
        except ValueError as error:  # a plan that this model has not, or a number that does not divide
            raise BadInput(f"{source.ref}: {layout}: {one_line(error)}; {ELSEWHERE}") from error
    if layout.ep > 1:
        _check_experts(model, layout, source.ref)
        _prefetch(model)
    return model, Sharded(ranks, model, layout)


def _check_plans(model: PreTrainedModel, layout: Layout, ref: str) -> None:
    """Refuse, before a weight is read, what the model's class does not say how to cut.

    Raises:
        UsageProblem: names what does work.
    """
    plans = {"tp": layout.tp, "ep": layout.ep, "fsdp": layout.data}
    lacking = [name for name, size in plans.items() if size > 1 and not getattr(model, f"{name}_plan", None)]
    if lacking:
        able = [f"--{name}" for name in plans if name not in lacking and getattr(model, f"{name}_plan", None)]
        told = f"{' and '.join(able)} can; " if able else ""
        raise UsageProblem(f"--{lacking[0]} {plans[lacking[0]]}: {ref} is a {type(model).__name__}, for which transformers has no "
                           f"{lacking[0]} plan; {told}{ELSEWHERE}")  # fmt: skip


def _check_experts(model: PreTrainedModel, layout: Layout, ref: str) -> None:
    """A rule of an expert plan that matches nothing is only a warning of transformers'; experts that every rank then holds whole
    would be trained on its own tokens.

    Raises:
        BadInput: names the first expert tensor that is not shared out.
    """
    ids = {id(param): name for name, param in model.named_parameters()}
    sites = find_sites(model)
    for site in sites:
        for param in site.expert_parameters():
            if not (isinstance(param, DTensor) and "ep" in (param.device_mesh.mesh_dim_names or ())
                    and param.placements[-1] == Shard(0)):  # fmt: skip
                raise BadInput(f"{ref}: --ep {layout.ep}: {ids[id(param)]} was not shared out among the ranks: transformers' plan for "
                               f"{type(model).__name__} does not reach it; use --fsdp without --ep")  # fmt: skip
    if not sites:
        raise BadInput(f"{ref}: --ep {layout.ep}: {type(model).__name__} has no mixture layers; use --fsdp")


def _prefetch(model: PreTrainedModel) -> None:
    """Gather the next layer, then its experts, while a layer runs. FSDP2 does so by itself, but for the experts' exchange of
    tokens, which makes the host wait for the sizes."""
    layers = [layer for layer in decoder_layers(model)[1] if isinstance(layer, FSDPModule)]

    def units(layer: Any) -> list[Any]:
        return [
            layer,
            *(module for module in layer.modules() if module is not layer and isinstance(module, FSDPModule)),
        ]

    for one, other in pairwise(layers):
        one.set_modules_to_forward_prefetch(units(other))
        other.set_modules_to_backward_prefetch(units(one))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bar, and no word on rules for layers that this model has not; those on experts are checked."""
    from transformers.utils import logging as told

    # whole tensors are put together in two steps where experts are cut twice, which is said for each of them
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    level, bars = told.get_verbosity(), told.is_progress_bar_enabled()
    told.set_verbosity_error()
    told.disable_progress_bar()
    try:
        yield
    finally:
        told.set_verbosity(level)
        if bars:
            told.enable_progress_bar()
