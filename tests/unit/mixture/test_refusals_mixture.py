"""Entries under `mixtures` that mean nothing are refused with the key and the value, before any module is made of them."""

import re

import pytest

from moeforge.errors import BadInput
from moeforge.mixture.config import ExpertsConfig, MixtureConfig
from moeforge.mixture.experts.base import Place

GOOD = {"site": "ffn", "layers": [0, 2], "experts": {"count": 4, "width": 24}, "router": {"top_k": 2}}


def test_a_good_entry_comes_back_as_it_was():
    read = MixtureConfig.from_json(GOOD)
    assert (read.layers, read.experts.count, read.experts.width, read.router.top_k) == ((0, 2), 4, 24, 2)
    assert MixtureConfig.from_json(read.as_json()) == read


@pytest.mark.parametrize(("changes", "told"), [
    ({"experts": {"count": 0}}, "mixture at ffn: experts.count = 0: must be at least 1"),
    ({"experts": {"count": -3}}, "mixture at ffn: experts.count = -3: must be at least 1"),
    ({"layers": []}, "mixture at ffn: layers = []: must be distinct layer numbers from 0"),
    ({"layers": [1, -1]}, "mixture at ffn: layers = [1, -1]: must be distinct"),
    ({"layers": [2, 1, 2]}, "mixture at ffn: layers = [2, 1, 2]: must be distinct"),
    ({"site": "text.ffn", "shared": {"count": 2}}, "mixture at text.ffn: shared.count = 2: there is one shared expert"),
    ({"router": {"top_k": 5}}, "router: top_k = 5: must lie between 1 and the number of experts, 4"),
    ({"experts": 4}, "mixtures.experts: expected an object, found 4"),
    ({"router": ["linear"]}, "mixtures.router: expected an object, found ['linear']"),
    ({"size": 3}, "mixtures: unknown key 'size'; a newer moeforge may have written it; known are experts, keep, "),
    ({"router": {"topk": 2}}, "mixtures.router: unknown key 'topk'; a newer moeforge may have written it"),
    ({"site": 3}, "mixtures.site = 3: expected str"),
    ({"keep": 1}, "mixtures.keep = 1: expected bool"),
    ({"layers": [0, "1"]}, "mixtures.layers = [0, '1']: expected tuple"),
    ({"layers": [True]}, "mixtures.layers = [True]: expected tuple"),
    ({"experts": {"count": "4"}}, "mixtures.experts.count = '4': expected int"),
    ({"experts": {"options": [8]}}, "mixtures.experts.options = [8]: expected Mapping"),
    ({"router": {"factor": "2"}}, "mixtures.router.factor = '2': expected float"),
    ({"router": {"capacity_factor": True}}, "mixtures.router.capacity_factor = True: expected float"),
    ({"router": {"score": "softmin"}}, "mixtures.router.score = 'softmin': expected 'softmax' or 'sigmoid'"),
])  # fmt: skip
def test_an_entry_without_meaning(changes, told):
    with pytest.raises(BadInput, match=re.escape(told)) as refusal:
        MixtureConfig.from_json(GOOD | changes)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("raw", [None, [GOOD], "ffn"])
def test_an_entry_that_is_no_object(raw):
    with pytest.raises(BadInput, match=re.escape(f"mixtures: expected an object, found {raw!r}")):
        MixtureConfig.from_json(raw)


@pytest.mark.parametrize(("names", "config", "told"), [
    (("gate", "up", "down"), ExpertsConfig(width=0), "experts at layers.1.mlp: width = 0: must be positive"),
    (("up", "down"), ExpertsConfig(width=-8, gated=False), "experts at layers.1.mlp: width = -8: must be positive"),
    (("up", "down"), ExpertsConfig(width=8), "gated = true, at layers.1.mlp: the network there has the linear maps down, up"),
    ((), ExpertsConfig(width=8, gated=False), "gated = false, at layers.1.mlp: the network there has the linear maps none"),
])  # fmt: skip
def test_experts_that_the_network_at_the_site_cannot_become(names, config, told):
    place = Place(32, 32, {name: f"{name}_proj" for name in names}, root="layers.1.mlp")
    with pytest.raises(BadInput, match=re.escape(told)):
        place.require_ffn(config)
