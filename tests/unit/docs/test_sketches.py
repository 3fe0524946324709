"""The sketches of methods run against the real protocols, and stay small."""

import runpy
from pathlib import Path

import pytest

SKETCHES = sorted((Path(__file__).parents[3] / "examples" / "sketches").glob("*.py"))


@pytest.mark.parametrize("sketch", SKETCHES, ids=lambda path: path.stem)
def test_a_sketch_of_a_method_runs_and_needs_at_most_sixty_lines(sketch, capsys):
    assert len(sketch.read_text("utf-8").splitlines()) <= 60
    runpy.run_path(str(sketch), run_name="__main__")
    assert capsys.readouterr().out


def test_the_page_names_every_sketch():
    page = (Path(__file__).parents[3] / "docs" / "mixtures.md").read_text("utf-8")
    assert SKETCHES
    assert all(f"examples/sketches/{sketch.name}" in page for sketch in SKETCHES)
