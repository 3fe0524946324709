"""moeforge's kernels under transformers' own mixture models: Mixtral, Qwen-MoE, OLMoE, GLM, DeepSeek and their kin.

transformers routes every experts module through one interface, so that one function serves them all; nothing is patched, and the
model saves and loads as before. A module whose computation is not down(act(gate) * up) is refused with the reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeforge_kernels.activations import CANONICAL
from moeforge_kernels.expert_ffn import OP, expert_ffn
from moeforge_kernels.pairs import pairs_from_slots

from ..errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "moeforge"
"""What `config._experts_implementation` says while our kernels run."""

FASTER = frozenset({"cpu"})
"""Backends measured to be no slower than transformers' own choice on every shape (tests/benchmarks/kernels/RESULTS.md). torch's are the
very products that transformers calls; Triton's have not been measured yet."""


def use_kernels(model: PreTrainedModel) -> PreTrainedModel:
    """Let the experts of a transformers model run through :func:`moeforge_kernels.expert_ffn.expert_ffn`, forward and backward.

    `model.set_experts_implementation("grouped_mm")` (or whatever it was before) undoes it.

    Returns:
        The same model.

    Raises:
        BadInput: it has no experts that transformers dispatches, or some that compute something else; names the first.
    """
    found = experts_of(model)
    if not found:
        raise BadInput(f"use_kernels: {type(model).__name__} has no experts behind transformers' experts interface")
    for name, module in found.items():
        if (reason := why_not(module)) is not None:
            raise BadInput(f"use_kernels: {name} ({type(module).__name__}) {reason}")
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    model.set_experts_implementation(NAME)
    return model


def use_kernels_where_faster(model: PreTrainedModel) -> bool:
    """:func:`use_kernels` where nothing is in the way and the backend that would run is one of `FASTER`; else nothing.

    Returns:
        Whether it was done.
    """
    found = experts_of(model)
    if not found or any(why_not(module) is not None or _backend(module) not in FASTER for module in found.values()):
        return False
    use_kernels(model)
    return True


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that transformers dispatches, by name: those on which its decorator has left how their weights lie."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "is_transposed") and hasattr(module, "has_gate")
    }


def why_not(module: Any) -> str | None:
    """What keeps our kernels from computing this module, in half a sentence; None: nothing."""
    from transformers.integrations.moe import _default_apply_gate

    if getattr(module, "has_post_expert_norm", False):
        return "normalises every expert's answer"
    if not getattr(module, "is_concatenated", True):
        return "interleaves the rows of gate and up"
    if module.has_gate and type(module)._apply_gate is not _default_apply_gate:
        return "has a gate of its own, not act(gate) * up"
    if _activation(module) is None:
        return f"has an activation that no kernel knows: {getattr(module, 'act_fn', None)!r}"
    for name in _weights(module):
        weight = getattr(module, name, None)
        if not isinstance(weight, Tensor) or weight.dim() != 3:
            return f"has no stacked weight {name}"
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            return f"stores {name} as {weight.dtype}"
    return None


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' experts function: [T, D], [T, K] expert ids (E or more: no expert), [T, K] weights -> [T, D]."""
    wide = torch.promote_types(top_k_weights.dtype, torch.float32)
    pairs = pairs_from_slots(top_k_index.clamp_max(module.num_experts), top_k_weights.to(wide), module.num_experts)
    return expert_ffn(hidden_states, pairs, **_arguments(module))


def _arguments(module: Any) -> dict[str, Any]:
    """The module's weights, as the op wants them."""
    names = _weights(module)
    up, down = (getattr(module, name) for name in names)
    if module.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    up_bias, down_bias = (getattr(module, f"{name}_bias") if module.has_bias else None for name in names)
    return {"up": up, "down": down, "up_bias": up_bias, "down_bias": down_bias, "gated": module.has_gate, "activation": _activation(module)}  # fmt: skip


def _weights(module: Any) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def _activation(module: Any) -> str | None:
    """Its name here, found by its class: modules keep the function, not what the config called it."""
    from transformers.activations import ACT2FN

    kind = type(getattr(module, "act_fn", None))
    return next((ours for theirs, ours in CANONICAL.items() if theirs in ACT2FN and type(ACT2FN[theirs]) is kind), None)


def _backend(module: Any) -> str:
    """The backend that one token would take."""
    arguments = _arguments(module)
    up: Tensor = arguments["up"]
    index = torch.zeros(1, 1, dtype=torch.long, device=up.device)
    pairs = pairs_from_slots(index, torch.ones(1, 1, device=up.device), len(up))
    return OP.choose(None, up.new_empty(1, up.shape[2]), pairs, **arguments).name
