"""examples/tutorial.ipynb, run as a reader would: a real kernel, the real command, the real model."""

import re

import nbformat
import pytest
from nbclient import NotebookClient

from moeforge.testing.command import ROOT, environment, moeforge_argv

TUTORIAL = ROOT / "examples" / "tutorial.ipynb"


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def text_of(notebook):
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


@pytest.mark.slow
def test_the_tutorial_runs_from_the_first_cell_to_the_last(tmp_path):
    notebook = nbformat.read(TUTORIAL, as_version=4)
    shipped = text_of(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "moeforge"
    script.write_text(f'#!/bin/sh\nexec {" ".join(moeforge_argv())} "$@"\n')
    script.chmod(0o755)
    client = NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env=environment(PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin"))

    said = text_of(notebook)
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) == 2
    # what the prose around the cells claims, in what was printed now and in what is shown to readers
    for shown in (said, shipped):
        proof = re.search(r"same function: relative error (\S+), argmax equal on 256 of 256 tokens", shown)
        assert proof is not None and float(proof[1]) <= 1e-5
        assert "warning: target qwen2_moe" in shown
        assert "experts:" in shown and "in nf4" in shown
        before, after = map(float, re.search(r"held-out loss (\S+) -> (\S+)", shown).groups())
        assert after < before
    assert (tmp_path / "tutorial" / "small" / "moeforge.json").exists()
