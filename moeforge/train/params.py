"""Which parameters learn, at which rate, and in which precision their sums are kept."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from ..errors import UsageProblem
from .routing import Site

GROUPS = ("all", "experts", "routers")
Optimizer = Literal["adamw", "adamw-8bit"]


@dataclass(frozen=True)
class Choice:
    """The parameters that learn: name -> parameter, in model order, and which of them belong to routers."""

    params: dict[str, nn.Parameter]
    routers: frozenset[str]

    @property
    def size(self) -> int:
        return sum(param.numel() for param in self.params.values())


def choose(model: nn.Module, sites: Sequence[Site], select: str) -> Choice:
    """Freeze all but the selected parameters.

    Args:
        select: comma-separated: `all`, `experts`, `routers`, or patterns on parameter names with * and ?
            (`*.layers.2?.*` is layers 20 to 29).

    Raises:
        UsageProblem: a part that selects nothing.
    """
    named = dict(model.named_parameters())
    ids = {id(param): name for name, param in named.items()}
    members = {
        "all": set(named),
        "experts": {ids[id(p)] for site in sites for p in site.expert_parameters() if id(p) in ids},
        "routers": {ids[id(p)] for site in sites for p in site.router.parameters() if id(p) in ids},
    }
    chosen: set[str] = set()
    for part in (part.strip() for part in select.split(",")):
        found = members[part] if part in members else set(fnmatch.filter(named, part))
        if not found:
            hint = "the model has no mixture layers" if part in GROUPS else f"names look like {next(iter(named))}"
            raise UsageProblem(f"--train {part}: selects no parameter; {hint}")
        chosen |= found
    for name, param in named.items():
        param.requires_grad_(name in chosen)
    return Choice({n: p for n, p in named.items() if n in chosen}, frozenset(members["routers"] & chosen))


class Masters:
    """float32 sums for parameters that compute in a shorter type.

    An update of relative size 1e-4 is lost in bfloat16's eight bits, so the optimizer works on a float32 copy, gradients
    are summed in float32 as they come, and the model gets the rounded result. A float32 (or float64) parameter is its own
    master.
    """

    def __init__(
        self, params: Mapping[str, nn.Parameter], precise: Callable[[str], torch.Tensor] | None = None
    ) -> None:
        """`precise` gives a parameter's unrounded float32 value by name; without it the model's own value is widened."""
        self.pairs: dict[str, tuple[nn.Parameter, torch.Tensor]] = {}
        for name, param in params.items():
            master: torch.Tensor = param
            if param.dtype in (torch.bfloat16, torch.float16):
                exact = precise(name) if precise is not None else param.detach().float()
                master = exact.detach().clone().requires_grad_()
                param.register_post_accumulate_grad_hook(partial(_hand_over, master))
            self.pairs[name] = (param, master)

    @property
    def named(self) -> dict[str, torch.Tensor]:
        return {name: master for name, (_, master) in self.pairs.items()}

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model."""
        for param, master in self.pairs.values():
            if param is not master:
                param.copy_(master)


def _hand_over(master: torch.Tensor, param: torch.Tensor) -> None:
    assert param.grad is not None
    if master.grad is None:
        master.grad = param.grad.to(master.dtype)
    else:
        master.grad.add_(param.grad)
    param.grad = None


def make_optimizer(choice: Choice, masters: Masters, *, kind: Optimizer = "adamw", rate: float, router_scale: float,
                   weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)) -> torch.optim.Optimizer:  # fmt: skip
    """AdamW (arXiv:1711.05101): torch's fused one, or bitsandbytes' with moments of 8 bits (arXiv:2110.02861), which keeps
    those of small parameters in float32. Norms and biases do not decay; routers learn at `rate * router_scale`. Each group
    holds `names` beside its `params`, and as `peak` its rate before the schedule."""
    groups: dict[tuple[bool, bool], dict[str, torch.Tensor]] = {}
    for name, master in masters.named.items():
        decays = master.ndim > 1 and not name.endswith("bias")
        groups.setdefault((name in choice.routers, decays), {})[name] = master
    table = [{"params": list(members.values()), "names": list(members), "peak": rate * (router_scale if router else 1.0),
              "weight_decay": weight_decay if decays else 0.0} for (router, decays), members in groups.items()]  # fmt: skip
    if kind == "adamw-8bit":
        from bitsandbytes.optim.adamw import AdamW8bit

        return AdamW8bit(table, lr=rate, betas=betas)
    return torch.optim.AdamW(table, lr=rate, betas=betas, fused=True)
