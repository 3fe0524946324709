"""Plots do not depend on how matplotlib is set up, and a machine that cannot draw is refused before the work."""

import subprocess
import sys

import pytest

from moeforge.errors import MachineLacks
from moeforge.report import plots
from moeforge.testing.command import environment


def test_an_unusable_backend_is_of_no_matter(tmp_path):
    code = f"from moeforge.report.plots import check_drawing, plot_loss; check_drawing(); plot_loss([], [], {str(tmp_path / 'a.png')!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(MPLBACKEND="nosuch"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_draw_is_refused_early(monkeypatch):
    def broken(*_):
        raise ImportError("no such library")

    monkeypatch.setattr(plots, "_axes", broken)
    with pytest.raises(MachineLacks, match="ImportError: no such library"):
        plots.check_drawing()
