"""LoRA experts beside one frozen linear map, a router of its own at each (MoLA, arXiv:2402.08562): y = W x + sum_e g_e s B_e A_e x.

New here: one kind of experts, low-rank and D -> D'. Router, pairs, losses, disk names and the layer are the library's.
"""

import torch
from torch import nn

from moeforge.mixture.config import RouterConfig
from moeforge.mixture.experts.base import Experts, Stored
from moeforge.mixture.layer import MixtureLayer
from moeforge.mixture.router import Router


class LoraExperts(Experts):
    """A [E, r, D], B [E, D', r]. All ranks side by side are two dense products: no sort, no loop, no copy of W."""

    def __init__(self, count, width, out_width, rank, alpha):
        super().__init__()
        self.count, self.width, self.rank, self.scale = count, width, rank, alpha / rank
        self.lora_A = nn.Parameter(torch.randn(count, rank, width) / width**0.5)
        self.lora_B = nn.Parameter(torch.zeros(count, out_width, rank))

    def forward(self, x, pairs):
        seen = (x @ self.lora_A.flatten(0, 1).T).unflatten(-1, (self.count, self.rank))
        chosen = seen * (self.scale * pairs.gates()).unsqueeze(-1).to(x.dtype)
        return chosen.flatten(1) @ self.lora_B.transpose(1, 2).flatten(0, 1)

    def stored(self):
        return {
            "lora_A": Stored(("lora_A.weight",), (self.rank,)),
            "lora_B": Stored(("lora_B.weight",), (self.lora_B.shape[1],)),
        }


def attach(linear, experts=8, top_k=2, rank=8, alpha=16):
    """The linear map with LoRA experts beside it; the map itself stays where it is, frozen and shared."""
    policy = RouterConfig(select="topk", top_k=top_k)
    bank = LoraExperts(experts, linear.in_features, linear.out_features, rank, alpha)
    return MixtureLayer(Router(policy, linear.in_features, experts), bank, kept=linear.requires_grad_(False))


if __name__ == "__main__":
    torch.manual_seed(0)
    x, linear = torch.randn(2, 5, 24), nn.Linear(24, 40)
    layer = attach(linear)
    nn.init.normal_(layer.router.weight)
    assert torch.equal(layer(x), linear(x)), "B = 0 leaves the map as it was"
    nn.init.normal_(layer.experts.lora_B)
    rows = x.flatten(0, 1)
    gates = layer.router(rows).pairs.gates()
    naive = sum(
        gates[:, e, None] * (rows @ layer.experts.lora_A[e].T @ layer.experts.lora_B[e].T) * 2 for e in range(8)
    )
    torch.testing.assert_close(layer(x).flatten(0, 1), linear(rows) + naive)
    print("LoRA experts agree with the sum over experts")
