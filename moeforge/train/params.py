"""Which parameters learn, at which rate, and in which precision their sums are kept."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ..errors import UsageProblem
from ..mixture.layer import MixtureLayer
from .routing import Site
from .settings import Optimizer

GROUPS = ("all", "experts", "routers")


@dataclass(frozen=True)
class Choice:
    """The parameters that learn: name -> parameter, in model order, and which of them belong to routers and to experts."""

    params: dict[str, nn.Parameter]
    routers: frozenset[str]
    experts: frozenset[str] = frozenset()

    @property
    def size(self) -> int:
        return sum(param.numel() for param in self.params.values())

    def told(self, total: int) -> str:
        """How many of a model's `total` parameters learn, by group, for people."""
        sizes = {"experts": 0, "routers": 0, "others": 0}
        for name, param in self.params.items():
            sizes["routers" if name in self.routers else "experts" if name in self.experts else "others"] += (
                param.numel()
            )
        parts = [f"{group} {size:,} ({size / total:.2%})" for group, size in sizes.items() if size]
        return f"{self.size:,} of {total:,} parameters learn ({self.size / total:.2%}): {', '.join(parts)}"


def frozen_in(model: nn.Module) -> frozenset[str]:
    """The parameters that a model with mixtures of ours holds frozen when it is loaded: the base under an adapter, imported experts."""
    if not any(isinstance(module, MixtureLayer) for module in model.modules()):
        return frozenset()
    return frozenset(name for name, param in model.named_parameters() if not param.requires_grad)


def choose(model: nn.Module, sites: Sequence[Site], select: str, frozen: frozenset[str] = frozenset()) -> Choice:
    """Freeze all but the selected parameters.

    Args:
        select: comma-separated: `all`, `experts`, `routers`, or patterns on parameter names with * and ?
            (`*.layers.2?.*` is layers 20 to 29).
        frozen: what stays frozen whatever is selected (:func:`frozen_in`).

    Raises:
        UsageProblem: a part that selects nothing, or only what is frozen.
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
        if found <= frozen:
            free = ", ".join(sorted(named.keys() - frozen)[:2]) or "nothing"
            raise UsageProblem(f"--train {part}: selects {len(found)} parameters, all of them frozen in this model ({min(found)} first); "
                               f"what can learn is called {free}")  # fmt: skip
        chosen |= found - frozen
    for name, param in named.items():
        param.requires_grad_(name in chosen)
    params = {n: p for n, p in named.items() if n in chosen}
    return Choice(params, *(frozenset(members[group] & chosen) for group in ("routers", "experts")))


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


def make_optimizer(choice: Choice, masters: Masters, *, kind: Optimizer = "adamw", rate: float, router_scale: float, weight_decay: float,
                   lora_plus: float = 1.0, betas: tuple[float, float] = (0.9, 0.95)) -> torch.optim.Optimizer:  # fmt: skip
    """AdamW (arXiv:1711.05101): torch's fused one, or bitsandbytes' with moments of 8 bits (arXiv:2110.02861), which keeps
    those of small parameters in float32. Norms, biases and routers do not decay; routers learn at `rate * router_scale`, the B of
    LoRA experts at `rate * lora_plus` (LoRA+, arXiv:2402.12354). Each group holds `names` beside its `params`, and as `peak`
    its rate before the schedule."""
    groups: dict[tuple[float, bool, object], dict[str, torch.Tensor]] = {}
    for name, master in masters.named.items():
        router = name in choice.routers
        decays = master.ndim > 1 and not name.endswith("bias") and not router
        scale = router_scale if router else lora_plus if name.endswith("lora_B") else 1.0
        # the fused step takes tensors of one mesh of ranks at once
        groups.setdefault((scale, decays, getattr(master, "device_mesh", None)), {})[name] = master
    table = [{"params": list(members.values()), "names": list(members), "peak": rate * scale,
              "weight_decay": weight_decay if decays else 0.0} for (scale, decays, _), members in groups.items()]  # fmt: skip
    if kind == "adamw-8bit":
        from bitsandbytes.optim.adamw import AdamW8bit

        return AdamW8bit(table, lr=rate, betas=betas)
    return torch.optim.AdamW(table, lr=rate, betas=betas, fused=True)
