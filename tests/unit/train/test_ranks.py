"""What all processes of a run do alike."""

import pytest
import torch

from moeforge.errors import GateRefused, Interrupted
from moeforge.train.ranks import Ranks, joined

ALONE = Ranks(0, 1, torch.device("cpu"))


def test_a_norm_does_not_depend_on_how_many_numbers_a_tensor_has():
    generator = torch.Generator().manual_seed(2)
    large = torch.randn(7_000_003, generator=generator) * 1e-4
    tensors = [large, torch.randn(3, 5, generator=generator).T, torch.zeros(0), torch.tensor(0.5)]
    wanted = torch.cat([tensor.double().reshape(-1) for tensor in tensors]).norm()
    assert float(ALONE.norm(tensors)) == pytest.approx(float(wanted), rel=1e-7)
    assert float(ALONE.norm([large])) == pytest.approx(float(large.double().norm()), rel=1e-7)
    assert float(ALONE.norm([])) == 0


def test_alone_nothing_is_asked_of_anyone():
    value = torch.randn(3)
    assert (
        ALONE.total(value) is value and ALONE.share("x") == "x" and ALONE.gathered(value).data_ptr() == value.data_ptr()
    )
    ALONE.agree(None)
    with pytest.raises(GateRefused, match="no number"):
        ALONE.agree(GateRefused("no number"))

    def stop():
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        ALONE.stop_together(stop)
    target = torch.zeros(3)
    ALONE.fill(target, value)
    assert torch.equal(target, value)


def test_errors_that_are_not_a_peer_s_are_left_alone():
    with pytest.raises(RuntimeError, match="of its own"), joined(1):
        raise RuntimeError("of its own")
