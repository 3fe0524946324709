"""Load what a stage wrote, and measure anew whether it is the function of its source. A process of its own, as it imports
torch and the plugins of whoever asks:

    python -m moeforge.testing.remeasure SRC OUT
"""

from __future__ import annotations

import json
import secrets
import sys
from dataclasses import asdict, dataclass

TOKENS = 48
ROWS = 3


@dataclass(frozen=True)
class Measured:
    """How two models differ on random tokens that nobody could have known beforehand."""

    finite: bool
    relative_error: float
    """max|dlogit| / max|logit|, both in float32."""
    argmax_equal: bool
    seed: int


def remeasure(src: str, out: str) -> Measured:
    """Both models whole and in float32, through the ordinary loader: another path than the stage's own proof takes.

    Raises:
        MoeforgeError: one of them cannot be loaded.
    """
    import torch

    from moeforge.model.load import load

    seed = secrets.randbits(32)
    made = load(out, dtype=torch.float32)
    vocabulary = made.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (ROWS, TOKENS), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        found = made(tokens).logits.double()
        wanted = load(src, dtype=torch.float32)(tokens).logits.double()
    finite = bool(found.isfinite().all())
    error = ((found - wanted).abs().max() / wanted.abs().max()).item()
    return Measured(finite, error, bool((found.argmax(-1) == wanted.argmax(-1)).all()), seed)


if __name__ == "__main__":
    print(json.dumps(asdict(remeasure(*sys.argv[1:]))))
