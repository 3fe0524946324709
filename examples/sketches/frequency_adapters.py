"""Adapters for frequency bands of an image, softly mixed (Earth-Adapter, arXiv:2504.06220): y = x + sum_b g_b adapter_b(band_b(x)).

New here: experts that see how tokens lie in the image, through `prepare`. The router mixes all of them: select = "all".
"""

import torch
from torch import nn

from moeforge.mixture.config import RouterConfig
from moeforge.mixture.experts.base import Experts, Stored
from moeforge.mixture.layer import MixtureLayer
from moeforge.mixture.router import Router


class BandAdapters(Experts):
    """Three bottlenecks: on the tokens as they are, on their low and on their high spatial frequencies."""

    count = 3

    def __init__(self, width, bottleneck, cutoff=0.3):
        super().__init__()
        self.width, self.bottleneck, self.cutoff = width, bottleneck, cutoff
        self.down_proj = nn.Parameter(torch.randn(3, bottleneck, width) / width**0.5)
        self.up_proj = nn.Parameter(torch.zeros(3, width, bottleneck))

    def prepare(self, hidden):
        """[B, H*W, D] -> [T, 3, D]: whole image, low band, high band of every token."""
        side = round(hidden.shape[1] ** 0.5)
        spectrum = torch.fft.fft2(hidden.float().unflatten(1, (side, side)), dim=(1, 2))
        frequency = torch.fft.fftfreq(side, device=hidden.device).abs()
        low = (torch.maximum(frequency[:, None], frequency[None, :]) <= self.cutoff / 2).unsqueeze(-1)
        smooth = torch.fft.ifft2(spectrum * low, dim=(1, 2)).real.flatten(1, 2).to(hidden.dtype)
        return torch.stack([hidden, smooth, hidden - smooth], -2).flatten(0, 1)

    def forward(self, x, pairs):
        inner = torch.relu(torch.einsum("tbd,brd->tbr", x, self.down_proj))
        return torch.einsum("tbr,bdr,tb->td", inner, self.up_proj, pairs.gates().to(x.dtype))

    def stored(self):
        rows = {"down_proj": self.bottleneck, "up_proj": self.width}
        return {name: Stored((f"{name}.weight",), (size,)) for name, size in rows.items()}


def adapter(width, bottleneck=16):
    """To stand beside a block: its answer is added to the block's."""
    return MixtureLayer(Router(RouterConfig(select="all"), width, 3), BandAdapters(width, bottleneck))


if __name__ == "__main__":
    torch.manual_seed(0)
    x, layer = torch.randn(2, 49, 24), adapter(24)
    nn.init.normal_(layer.router.weight)
    assert not layer(x).any(), "nothing is added before training"
    nn.init.normal_(layer.experts.up_proj)
    bands = layer.experts.prepare(x).unflatten(0, (2, 49))
    torch.testing.assert_close(bands[:, :, 1] + bands[:, :, 2], x)
    gates = (x @ layer.router.weight.T).softmax(-1)
    answers = [torch.relu(bands[:, :, b] @ layer.experts.down_proj[b].T) @ layer.experts.up_proj[b].T for b in range(3)]
    torch.testing.assert_close(layer(x), sum(gates[..., b, None] * answers[b] for b in range(3)))
    print("band adapters agree with the sum over bands")
