"""route: every backend makes the list that a stable sort of a plain top-k makes, and the same gradient."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moeforge_kernels.routing import OP, route

ROOT = Path(__file__).resolve().parents[3]
POLICIES = list(itertools.product(["softmax", "sigmoid"], [True, False], [True, False], [True, False]))
SIZES = [(13, 5, 2), (150, 7, 3), (1, 4, 4), (70, 128, 8), (0, 3, 1)]


def compare(backend):
    """Of `backend` with arithmetic written out here, in float64."""
    for seed, ((tokens, experts, k), (score, first, renormalise, masked)) in enumerate(
        itertools.product(SIZES, POLICIES)
    ):
        generator = torch.Generator().manual_seed(seed)
        # steps of 1/4: ties are the rule
        logits = (torch.randn(tokens, experts, generator=generator) * 4).round().div(4).requires_grad_()
        bias = torch.randn(experts, generator=generator) if seed % 3 == 0 else None
        real = torch.rand(tokens, generator=generator) > 0.3 if masked else None
        pairs = route(logits, k, score=score, select_first=first, renormalise=renormalise, factor=2.5, bias=bias, real=real, backend=backend)  # fmt: skip
        wanted = []
        exact = logits.detach().double()
        scores = exact.softmax(-1) if score == "softmax" else exact.sigmoid()
        for t in range(tokens):
            # the preference in float32, as ties are made there
            value = logits.detach()[t] if first else (logits.detach()[t].softmax(-1) if score == "softmax" else logits.detach()[t].sigmoid())  # fmt: skip
            value = value if bias is None else value + bias
            best = sorted(range(experts), key=lambda e: (-float(value[e]), e))[:k]
            gates = scores[t, best]
            if first:
                gates = exact[t, best].softmax(-1) if score == "softmax" else exact[t, best].sigmoid()
            gates = 2.5 * (gates / gates.sum() if renormalise else gates)
            wanted += [(e, t, float(g)) for e, g in zip(best, gates, strict=True)] if real is None or real[t] else []
        wanted.sort()
        filled = len(wanted)
        assert int(pairs.offsets[-1]) == filled and len(pairs.token) == tokens * k
        assert [(int(e), int(t)) for e, t in zip(pairs.expert[:filled], pairs.token[:filled], strict=True)] == [
            w[:2] for w in wanted
        ]
        assert torch.allclose(
            pairs.weight[:filled].double(), torch.tensor([w[2] for w in wanted], dtype=torch.float64), rtol=1e-5
        )
        assert (pairs.expert[filled:] == experts).all() and (pairs.weight[filled:] == 0).all()
        assert pairs.counts().tolist() == [sum(w[0] == e for w in wanted) for e in range(experts)]
        assert sorted(pairs.by_token.tolist()) == list(range(tokens * k))
        assert pairs.token[pairs.by_token].tolist() == [t for t in range(tokens) for _ in range(k)]
        if tokens:
            seeds = torch.randn(pairs.weight.shape, generator=generator)
            truth = route(logits.double(), k, score=score, select_first=first, renormalise=renormalise, factor=2.5, bias=bias, real=real, backend="reference")  # fmt: skip
            found, true = (torch.autograd.grad(p.weight, logits, seeds.to(p.weight.dtype))[0] for p in (pairs, truth))
            assert torch.allclose(found, true, rtol=1e-4, atol=1e-6)


def test_the_reference_is_a_stable_sort_of_a_plain_top_k():
    compare("reference")


@pytest.mark.slow
def test_triton_makes_the_same_list():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run(
        [sys.executable, __file__, "triton"], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


def test_too_many_experts_for_one_program_are_refused():
    from moeforge_kernels.dispatch import triton_is_usable

    if triton_is_usable("cpu") is None:
        with pytest.raises(ValueError, match="at most 1024 experts, not 2000"):
            route(torch.randn(2, 2000), 2, backend="triton")
    assert OP.choose(None, torch.randn(2, 2000), 2, bias=None).name != "triton"


if __name__ == "__main__":
    compare(sys.argv[1])
