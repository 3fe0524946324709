"""What a feed-forward network computes, learnt by asking it: its own `forward` runs on a few small numbers.

Names say little (`w1`, `fc1`, `dense_h_to_4h`) and configs mislead, so a gated network is run with its linear maps replaced
by tiny ones and compared with every formula that the kernels know; an activation is compared with theirs on some points. Both
in float64, where two different formulas never agree and one formula always does.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeforge_kernels.activations import CANONICAL, FUNCTIONS

from ..errors import BadInput, one_line

TOLERANCE = 1e-9
D, WIDTH, TOKENS = 5, 3, 4
"""Sizes of the trial: unequal, so that no product fits by chance."""


@dataclass(frozen=True)
class Formula:
    """A gated network: down(act(gate x) * up x); paths below its module, `gate_up` where the two lie in one matrix."""

    activation: str
    down: str
    gate: str = ""
    up: str = ""
    gate_up: str = ""


@dataclass(frozen=True)
class Activation:
    """An activation function.

    Attributes:
        path: module or attribute that holds it.
        name: the kernels' name of it.
    """

    path: str
    name: str


def gated_formula(module: nn.Module, names: list[str], where: str) -> Formula:
    """Which formula the module computes.

    Args:
        names: paths of its linear maps, the one that leads out last.
        where: for the error.

    Raises:
        BadInput: it cannot be run, or none that is known fits.
    """
    *inner, down = names
    rows = {name: (WIDTH if len(inner) == 2 else 2 * WIDTH, D) for name in inner} | {down: (D, WIDTH)}
    random = torch.Generator("cpu").manual_seed(0)
    weights: dict[str, Tensor] = {}
    for name, (outputs, inputs) in rows.items():
        weights[f"{name}.weight"] = _random(random, outputs, inputs)
        if getattr(module.get_submodule(name), "bias", None) is not None:
            weights[f"{name}.bias"] = _random(random, outputs)
    x = _random(random, TOKENS, D)
    try:
        with torch.no_grad():
            found = torch.func.functional_call(_unpacked(module, names), weights, (x,))
    except Exception as error:  # whatever a stranger's forward raises: it is not the network that we look for
        raise BadInput(
            f"{where}: {type(module).__name__} cannot be tried on small numbers: {one_line(error)}"
        ) from error

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    orders = list(itertools.permutations(inner)) if len(inner) == 2 else [(inner[0],)]
    for names_of, act in itertools.product(orders, sorted(FUNCTIONS)):
        gate, up = linear(names_of[0], x).chunk(2, -1) if len(inner) == 1 else (linear(name, x) for name in names_of)
        wanted = linear(down, FUNCTIONS[act](gate) * up)
        if (
            isinstance(found, Tensor)
            and found.shape == wanted.shape
            and torch.allclose(found, wanted, TOLERANCE, TOLERANCE)
        ):
            if len(inner) == 1:
                return Formula(act, down, gate_up=inner[0])
            return Formula(act, down, gate=names_of[0], up=names_of[1])
    raise BadInput(
        f"{where}: {type(module).__name__} with the linear maps {', '.join(names)} is no gated network with one of the "
        f"activations {', '.join(sorted(FUNCTIONS))}"
    )


def _unpacked(module: nn.Module, names: list[str]) -> nn.Module:
    """The module with plain linear maps where it has packed ones (4 bits), which run on nothing but their own weights; itself where
    there are none. What is not packed is shared."""
    packed = [name for name in names if not _is_plain(module.get_submodule(name))]
    made = copy.copy(module) if packed else module
    for name in packed:
        old, owner = module.get_submodule(name), made
        owner._modules = dict(owner._modules)
        *holders, leaf = name.split(".")
        for holder in holders:
            inner = copy.copy(owner.get_submodule(holder))
            inner._modules = dict(inner._modules)
            owner._modules[holder] = inner
            owner = inner
        owner._modules[leaf] = nn.Linear(1, 1, bias=getattr(old, "bias", None) is not None, device="meta")
    return made


def _is_plain(linear: nn.Module) -> bool:
    weight = getattr(linear, "weight", None)
    return isinstance(weight, Tensor) and weight.is_floating_point()


def activation_beside(layer: nn.Module, holder: str) -> Iterator[Activation]:
    """The activations that a module holds as children or attributes, by name if a kernel knows them."""
    module = layer.get_submodule(holder)
    held: dict[str, Any] = {**vars(module), **module._modules}
    for name, value in held.items():
        if callable(value) and not isinstance(value, type) and not _holds_weights(value):
            known = _recognise(value)
            if known is not None:
                yield Activation(f"{holder}.{name}".lstrip("."), known)


def _holds_weights(value: Any) -> bool:
    return isinstance(value, nn.Module) and (next(value.parameters(), None) is not None or bool(value._modules))


def _recognise(function: Callable[[Tensor], Any]) -> str | None:
    """The kernels' name of a function of one tensor, None where it is another."""
    points = torch.linspace(-6, 6, 49, dtype=torch.float64, device="cpu")
    if isinstance(function, nn.Dropout | nn.Identity):  # identities by chance: nothing happens in evaluation, or ever
        return None
    try:
        with torch.no_grad():
            found = function(points)
    except Exception:  # noqa: BLE001 - any callable may stand here, and one that refuses a tensor is no activation
        return None
    if not isinstance(found, Tensor) or found.shape != points.shape:
        return None
    return next((name for name in sorted(set(CANONICAL.values())) if torch.allclose(found, FUNCTIONS[name](points), TOLERANCE,
                                                                                    TOLERANCE)), None)  # fmt: skip


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
