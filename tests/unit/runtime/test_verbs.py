"""What the verbs make of a checkpoint with mixtures: counted by show, whole for verify, refused where it cannot serve."""

import pytest

from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.anatomy import anatomy
from moeforge.errors import BadInput
from moeforge.mixture.config import ExpertsConfig, MixtureConfig, RouterConfig
from moeforge.model.build import build, require_generation
from moeforge.model.load import load
from moeforge.model.weights import WeightMap

from .conftest import dense, mixed


@pytest.mark.parametrize(("family", "width"), [("llama", 44), ("gpt2", 128), ("bert", 44), ("vit", 44), ("llava", 44)])
def test_experts_are_counted_from_the_entries(family, width, tmp_path):
    model = mixed(family, MixtureConfig(layers=(1,), experts=ExpertsConfig(count=5), router=RouterConfig(top_k=2)))
    model.save_pretrained(tmp_path)
    with open_checkpoint(str(tmp_path)) as checkpoint:
        found = anatomy(checkpoint.config, checkpoint.tensors)
        stored = sum(info.size for info in checkpoint.tensors.values())
    (mixture,) = [m for m in found.mixtures if 1 in m.layers]
    assert (mixture.experts, mixture.top_k, mixture.width) == (5, 2, width)
    ((_, layer),) = model.mixtures.values()
    held = sum(value.numel() for value in layer.experts.parameters())
    assert found.parameters_total == stored
    assert found.parameters_active == stored - held * 3 // 5
    assert found.architectures == (type(model).__name__, type(dense(family)).__name__)


def test_a_router_that_decides_token_by_token_has_no_number_of_active_experts(tmp_path):
    mixed("llama", MixtureConfig(experts=ExpertsConfig(count=4), router=RouterConfig(select="topp"))).save_pretrained(
        tmp_path
    )
    with open_checkpoint(str(tmp_path)) as checkpoint:
        found = anatomy(checkpoint.config, checkpoint.tensors)
    assert found.parameters_active is None and found.mixtures[0].top_k is None


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_what_continues_no_text_is_refused_by_name(family, tmp_path):
    for model in (dense(family), mixed(family)):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        with open_checkpoint(str(folder)) as checkpoint:
            WeightMap(checkpoint, build(checkpoint.config))  # it is whole, and built as the class that it names
            with pytest.raises(BadInput, match=f"{type(model).__name__} is a .*; this needs a causal language model"):
                require_generation(checkpoint.config, checkpoint.ref)
        assert type(load(str(folder))) is type(model)
    mixed("gpt2").save_pretrained(tmp_path / "gpt2")
    with open_checkpoint(str(tmp_path / "gpt2")) as checkpoint:
        require_generation(checkpoint.config, checkpoint.ref)
