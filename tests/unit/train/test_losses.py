"""The task's loss against a float64 reference written out by hand."""

import math

import pytest
import torch

from moeforge.train.losses import token_loss_sum


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
