"""Block sizes: the rule's, and above it the table of this machine."""

import json

import pytest
import torch

from moeforge_kernels import tuning
from moeforge_kernels.tuning import Blocks, Shape

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEFORGE_HOME", str(tmp_path))
    tuning._table.cache_clear()
    return tmp_path


def test_without_a_table_the_rule_holds():
    shape = Shape.of(pairs=100, experts=8, n=256, k=128)
    assert shape.rows == 16
    assert tuning.blocks("product", shape, torch.bfloat16, CPU) == tuning.rule("product", shape, torch.bfloat16)


@pytest.mark.parametrize("kernel", ["gated", "product", "hidden", "gram"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pairs", [1, 4096, 10**6])
def test_what_is_measured_begins_with_the_rule_and_is_powers_of_two(kernel, dtype, pairs):
    shape = Shape.of(pairs, 8, 4096, 1024)
    found = tuning.candidates(kernel, shape, dtype)
    assert found[0] == tuning.rule(kernel, shape, dtype) and len(set(found)) == len(found) > 3
    for blocks in found:
        assert all(size >= 16 and size & (size - 1) == 0 for size in (blocks.m, blocks.n, blocks.k))


def test_what_was_measured_wins_for_its_shape_type_kernel_and_device_alone(home):
    shape, best = Shape.of(4096, 8, 256, 128), Blocks(32, 256, 32, 8, 2)
    tuning.remember("product", shape, torch.bfloat16, CPU, best, 1.25)
    assert tuning.blocks("product", shape, torch.bfloat16, CPU) == best
    other = Shape.of(4096, 8, 256, 64)
    for kernel, size, dtype in (
        ("gated", shape, torch.bfloat16),
        ("product", other, torch.bfloat16),
        ("product", shape, torch.float32),
    ):
        assert tuning.blocks(kernel, size, dtype, CPU) == tuning.rule(kernel, size, dtype)
    tuning.remember("gram", other, torch.float32, CPU, Blocks(64, 64, 32, 4, 3), 2.0)
    table = json.loads((home / "kernels.json").read_text())
    assert table["version"] == tuning.VERSION
    line = table["devices"]["cpu"]["product"]["bfloat16"]["rows=512 n=256 k=128"]
    assert line["ms"] == 1.25 and line["blocks"]["n"] == 256
    assert set(table["devices"]["cpu"]) == {"product", "gram"}
    assert [path.name for path in home.iterdir()] == ["kernels.json"]


@pytest.mark.parametrize("text", ['{"version": 0, "devices": {"cpu": 1}}', "[]", "{"])
def test_a_table_of_another_version_or_half_a_table_is_ignored(home, text):
    (home / "kernels.json").write_text(text)
    shape = Shape.of(4096, 8, 256, 128)
    assert tuning.blocks("product", shape, torch.float32, CPU) == tuning.rule("product", shape, torch.float32)


def test_blocks_can_be_forced_for_measuring():
    shape, blocks = Shape.of(4096, 8, 256, 128), Blocks(16, 16, 16, 1, 1)
    with tuning.forced("product", blocks):
        assert tuning.blocks("product", shape, torch.float32, CPU) == blocks
    assert tuning.blocks("product", shape, torch.float32, CPU) != blocks
