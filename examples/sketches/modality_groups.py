"""FFN experts in groups, one group a modality, each expert taking its best tokens of that group (MoMa, arXiv:2407.21770).

New here: nothing but a policy. `by_label` splits the experts between labels; the batch's labels reach the router by the context.
`renormalise` and `fallback = argmax` make copies of the dense FFN exact at step 0, which the paper's form is not.
"""

import torch
from torch import nn

from moeforge.mixture.config import RouterConfig
from moeforge.mixture.context import MixtureContext
from moeforge.mixture.experts.ffn import FFNExperts
from moeforge.mixture.layer import MixtureLayer
from moeforge.mixture.router import Router

TEXT, IMAGE = 0, 1


def moma(width, ffn_width, text=4, image=4):
    """Experts 0..text-1 are for text tokens, the others for image tokens; sigmoid scores, so experts do not compete per token."""
    policy = RouterConfig(
        select="expert_choice", top_k=1, capacity_factor=1.0, causal=False, score="sigmoid", renormalise=True,
        fallback="argmax", by_label=(text, image),
    )  # fmt: skip
    return MixtureLayer(Router(policy, width, text + image), FFNExperts(text + image, width, ffn_width))


if __name__ == "__main__":
    torch.manual_seed(0)
    x, layer = torch.randn(2, 12, 24), moma(24, 40)
    gate_up, down = torch.randn(80, 24) * 0.3, torch.randn(24, 40) * 0.3
    with torch.no_grad():
        layer.experts.gate_up_proj.copy_(gate_up.expand(8, -1, -1))
        layer.experts.down_proj.copy_(down.expand(8, -1, -1))
        nn.init.normal_(layer.router.weight)
    layer.context = MixtureContext()
    labels = torch.tensor([TEXT] * 5 + [IMAGE] * 7).expand(2, -1)
    layer.context.begin(labels=labels)
    gate, up = (x @ gate_up.T).chunk(2, -1)
    torch.testing.assert_close(layer(x), (nn.functional.silu(gate) * up) @ down.T)
    before = layer(x)
    with torch.no_grad():
        layer.experts.down_proj[4:] += 1  # the image experts change ...
    changed = (layer(x) != before).any(-1)
    assert torch.equal(changed, labels == IMAGE), "... and no text token sees it, bit for bit"
    print("modality groups agree with the dense FFN at step 0, and keep to themselves")
