"""Attention heads as experts (MoH, arXiv:2410.11842): a token uses its top-k heads, chosen by what the block is given.

The experts stand at the output projection; the choice is made at the block's entrance, so the block owns a SharedRouter and the site
follows it. New here: one kind of experts that slices instead of multiplying.
"""

import torch
from torch import nn

from moeforge.mixture.config import RouterConfig
from moeforge.mixture.experts.base import Experts, Stored
from moeforge.mixture.layer import MixtureLayer
from moeforge.mixture.router import Router
from moeforge.mixture.shared import Following, SharedRouter


class Heads(Experts):
    """Head h is columns h*d..(h+1)*d of the output projection: sum_h g_h W_h head_h is one product with gated inputs."""

    def __init__(self, o_proj, heads):
        super().__init__()
        self.count, self.width, self.weight = heads, o_proj.in_features, o_proj.weight

    def prepare(self, hidden):
        return hidden.reshape(-1, self.count, self.width // self.count)

    def forward(self, x, pairs):
        return (x * pairs.gates().unsqueeze(-1).to(x.dtype)).flatten(1) @ self.weight.T

    def stored(self):
        return {"weight": Stored(("o_proj.weight",), (self.weight.shape[0],), shared=True)}


def choose_heads(attention, heads, top_k, width):
    """Put the choice before an attention module and its effect at the output projection. Weights times top_k: all equal = dense."""
    policy = RouterConfig(select="topk", top_k=top_k, factor=top_k)
    leader = SharedRouter(Router(policy, width, heads), name="heads")
    leader.stand_before(attention)
    attention.o_proj = MixtureLayer(Following(leader), Heads(attention.o_proj, heads))


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.v_proj, self.o_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, hidden):
        return self.o_proj(self.v_proj(hidden))  # what matters: the input of o_proj lies head by head


if __name__ == "__main__":
    torch.manual_seed(0)
    x, block = torch.randn(2, 5, 24), Attention(24)
    dense = block(x)
    choose_heads(block, heads=6, top_k=6, width=24)
    nn.init.zeros_(weight := block.shared_router.router.weight)
    torch.testing.assert_close(block(x), dense)  # all heads, all equal: the dense block
    nn.init.normal_(weight)
    assert (block(x) - dense).abs().max() > 1e-3
    print("heads chosen at the entrance act at the output projection")
