"""How every kind of low-rank experts starts, and the norms that magnitudes need."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...errors import BadInput


def start(parameters: Mapping[str, nn.Parameter]) -> None:
    """B = 0, so that nothing differs from the base yet; A as in a linear layer, kaiming_uniform(sqrt 5); magnitudes are set when the
    base's weights are known."""
    for name, parameter in parameters.items():
        if name.endswith("lora_A"):
            bound = 1 / math.sqrt(parameter.shape[-1])
            nn.init.uniform_(parameter, -bound, bound)
        else:
            nn.init.zeros_(parameter)


class Scales:
    """s of each expert as a tensor, made once a type and device: a decoding step asks for it at every map.

    Args:
        values: s of each expert.
    """

    def __init__(self, values: tuple[float, ...]) -> None:
        self.values = values
        self._latest: Tensor | None = None

    def beside(self, parameter: Tensor) -> Tensor:
        """[E] float32 (float64 beside float64), where the parameter lies."""
        dtype, kept = torch.promote_types(parameter.dtype, torch.float32), self._latest
        if torch.compiler.is_compiling() or type(parameter) not in (Tensor, nn.Parameter):
            return torch.tensor(self.values, dtype=dtype, device=parameter.device)
        if kept is None or kept.dtype != dtype or kept.device != parameter.device:
            with torch.inference_mode(False):  # a tensor made inside could not take part in training later
                self._latest = kept = torch.tensor(self.values, dtype=dtype, device=parameter.device)
        return kept


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """||W + s_e B_e A_e|| of every row, [E, D'], without making that matrix: ||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>.

    Args:
        weight: W [D', D]. a: [E or 1, r, D]. b: [E, D', r]. scale: [E].
    """
    wide = torch.promote_types(b.dtype, torch.float32)
    weight, a, b = weight.to(wide), a.to(wide), b.to(wide)
    s = scale.to(wide).view(-1, 1)
    cross = (torch.einsum("od,erd->eor", weight, a) * b).sum(-1)
    own = (b @ (a @ a.transpose(1, 2)) * b).sum(-1)
    return (weight.square().sum(-1) + 2 * s * cross + s * s * own).clamp_min(0).sqrt()


def weight_of(module: nn.Module) -> Tensor:
    """[D', D] of a linear map, however it is held.

    Raises:
        BadInput: it is packed.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise BadInput(
            f"DoRA needs the base's weights, and {type(module).__name__} holds them packed; attach to the plain base, or leave dora out"
        )
    outputs = getattr(module, "out_features", getattr(module, "nf", weight.shape[0]))
    turned = type(module).__name__ in ("Conv1D", "TransposedLinear") and (weight.shape[1] == outputs)
    return weight.T if turned else weight
