"""Losses against float64 references written out by hand."""

import math

import pytest
import torch

from moeforge.train.losses import balance_loss, router_losses, router_probabilities, token_loss_sum, z_loss


def test_token_loss_is_the_sum_over_labelled_tokens():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(7, (3, 5), generator=generator)
    labels[0, 2] = labels[2, 4] = -100
    expected = 0.0
    for row, line in zip(logits.tolist(), labels.tolist(), strict=True):
        for values, label in zip(row, line, strict=True):
            if label >= 0:
                expected += math.log(sum(math.exp(v) for v in values)) - values[label]
    assert float(token_loss_sum(logits, labels)) == pytest.approx(expected, rel=1e-12)
    short = token_loss_sum(logits.to(torch.bfloat16), labels)
    assert short.dtype == torch.float32
    assert float(short) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("experts", [3, 8])
def test_balance_is_one_when_even_and_more_when_not(experts):
    even = torch.full((experts,), 1 / experts, dtype=torch.float64)
    assert float(balance_loss(even, even)) == pytest.approx(1.0, rel=1e-12)
    one = torch.zeros(experts, dtype=torch.float64)
    one[1] = 1
    assert float(balance_loss(one, one)) == pytest.approx(experts, rel=1e-12)


def reference(logits, chosen, real, sigmoid):
    """Balance loss and z-loss of one layer, token by token."""
    experts = logits.shape[1]
    probability, count, z, tokens = [0.0] * experts, [0] * experts, 0.0, 0
    for values, picks, counted in zip(logits.tolist(), chosen.tolist(), real.tolist(), strict=True):
        if not counted:
            continue
        tokens += 1
        scores = [1 / (1 + math.exp(-v)) if sigmoid else math.exp(v) for v in values]
        probability = [p + s / sum(scores) for p, s in zip(probability, scores, strict=True)]
        z += math.log(sum(math.exp(v) for v in values)) ** 2
        for pick in picks:
            count[pick] += 1
    fractions = [c / sum(count) for c in count]
    return experts * sum(p / tokens * f for p, f in zip(probability, fractions, strict=True)), z / tokens


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_router_losses_leave_padding_out_and_add_layers(scoring):
    generator = torch.Generator().manual_seed(2)
    layers = [torch.randn(13, experts, generator=generator, dtype=torch.float64) * 2 for experts in (5, 4)]
    chosen = [layer.topk(2, -1).indices for layer in layers]
    real = torch.tensor([True] * 9 + [False] * 4)
    counts = [
        torch.bincount(pick[real].flatten(), minlength=layer.shape[1])
        for layer, pick in zip(layers, chosen, strict=True)
    ]
    balance, z = router_losses(layers, counts, real, [scoring] * 2)
    expected = [reference(layer, pick, real, scoring == "sigmoid") for layer, pick in zip(layers, chosen, strict=True)]
    assert float(balance) == pytest.approx(sum(b for b, _ in expected), rel=1e-9)
    assert float(z) == pytest.approx(sum(z for _, z in expected), rel=1e-9)
    # what stands in padding must not matter
    for layer in layers:
        layer[9:] = 1000.0
    again, _ = router_losses(layers, counts, real, [scoring] * 2)
    assert float(again) == float(balance)


def test_balance_gradient_lowers_the_busy_expert():
    logits = torch.tensor([[3.0, 0.0, 0.0, -1.0]] * 6, dtype=torch.float64).requires_grad_()
    counts = torch.tensor([12.0, 0, 0, 0], dtype=torch.float64)
    balance, _ = router_losses([logits], [counts], torch.ones(6, dtype=torch.bool), ["softmax"])
    balance.backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


def test_probabilities_sum_to_one_in_float32():
    logits = (torch.randn(7, 5, generator=torch.Generator().manual_seed(3)) * 20).to(torch.bfloat16)
    for scoring in ("softmax", "sigmoid"):
        found = router_probabilities(logits, scoring)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.sum(-1), torch.ones(7))
    assert z_loss(logits).dtype == torch.float32
