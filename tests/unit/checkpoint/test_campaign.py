"""A short campaign of damaged inputs; `python -m moeforge.testing.campaign` runs the long one."""

import random
import shutil

import pytest

from moeforge.testing.campaign import make_sources, run_campaign
from moeforge.testing.mutations import HEADERS


def test_every_damaged_source_is_refused_in_one_line_or_taken_rightly(tmp_path):
    report = run_campaign(420, seed=11, where=tmp_path, by_command=2)
    assert not report.faults, report.table()
    ends = [count for count in report.outcomes.values()]
    assert sum(count["refused"] for count in ends) > 240, "damage that nobody notices proves nothing"
    assert {source for source, _ in report.outcomes} == {"single", "shards", "adapter", "experts", "int8", "gguf"}
    assert report.by_command >= 2
    assert report.table().splitlines()[-2].split()[:2] == ["all", "420"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("sources"))["single"].path


@pytest.mark.parametrize("mutation", HEADERS, ids=lambda mutation: mutation.__name__)
def test_the_same_seed_makes_the_same_damage(mutation, sound, tmp_path):
    made = []
    for seed in ("1", "1", "2"):
        copy = shutil.copytree(sound, tmp_path / f"copy-{len(made)}")
        mutation(random.Random(seed), copy)
        made.append({path.name: path.read_bytes() for path in copy.iterdir()})
    assert made[0] == made[1]
    assert made[0] != {path.name: path.read_bytes() for path in sound.iterdir()}
