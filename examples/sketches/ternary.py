"""Ternary experts beside the frozen dense FFN (MoTE, arXiv:2506.14435): y = FFN(x) + g T_e(x), weights of T in {-1, 0, 1} * scale.

New here: how weights act. They are kept in full precision while training and rounded on the way, gradients passing through.
"""

import torch
from torch import nn

from moeforge.mixture.config import RouterConfig
from moeforge.mixture.experts.ffn import FFNExperts
from moeforge.mixture.layer import MixtureLayer
from moeforge.mixture.router import Router


def ternary(weight):
    """Each expert's matrix rounded to {-1, 0, 1} times its mean magnitude (BitNet b1.58), straight through for gradients."""
    scale = weight.detach().abs().mean((-2, -1), keepdim=True).clamp_min(1e-5)
    rounded = (weight.detach() / scale).round().clamp(-1, 1) * scale
    return rounded + (weight - weight.detach())  # this way round the sum is exact: three values, not nearly three


class TernaryExperts(FFNExperts):
    """FFN experts whose weights act rounded; storage, kernels and routing are those of whole FFNs."""

    def weights(self):
        up, down = super().weights()
        return ternary(up), ternary(down)


def beside(ffn, width, ffn_width, experts=4):
    """The dense FFN stays, frozen; top-1 of the ternary experts is added with its probability."""
    policy = RouterConfig(select="topk", top_k=1, renormalise=False)
    return MixtureLayer(
        Router(policy, width, experts), TernaryExperts(experts, width, ffn_width), kept=ffn.requires_grad_(False)
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    x = torch.randn(2, 5, 24)
    layer = beside(nn.Sequential(nn.Linear(24, 40), nn.SiLU(), nn.Linear(40, 24)), 24, 40)
    for parameter in (layer.router.weight, *layer.experts.parameters()):
        nn.init.normal_(parameter, std=0.3)
    up, down = layer.experts.weights()
    assert {len(matrix.unique()) for matrix in (*up, *down)} == {3}
    layer(x).square().sum().backward()
    assert layer.experts.gate_up_proj.grad.abs().sum() > 0 and layer.kept[0].weight.grad is None
    print("ternary experts act with three values and learn in full precision")
