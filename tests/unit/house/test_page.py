"""A page goes where nothing of anybody's is lost, and its place is judged before the work begins."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from moeforge.errors import UsageProblem
from moeforge.options import opt
from moeforge.pipeline.artifact import Artifact
from moeforge.pipeline.page import find_place, write_page
from moeforge.pipeline.place import PAGE
from moeforge.testing.command import run

TEXT = PAGE.decode() + "<title>x</title></head><body></body></html>\n"


@dataclass(frozen=True)
class Options:
    text: Path | None = opt("read", default=None)


@pytest.fixture
def source(tmp_path):
    directory = tmp_path / "src"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return Artifact("checkpoint", str(directory), directory)


def test_a_page_is_written_and_replaced_by_the_next_one(tmp_path, source):
    place = find_place(tmp_path / "new" / "page.html", False, [source], Options())
    write_page(TEXT, place, False)
    assert find_place(place, False, [source], Options()) == place
    write_page(TEXT + "<!-- again -->", place, False)
    assert place.read_text().endswith("again -->")
    assert [path.name for path in place.parent.iterdir()] == ["page.html"]
    assert place.stat().st_mode & 0o777 == (source.path / "config.json").stat().st_mode & 0o777


def test_what_is_not_a_page_of_ours_is_kept_whatever_is_asked(tmp_path, source):
    place = tmp_path / "page.html"
    place.write_text("<!doctype html>\n<title>mine</title>")
    for force, told in ((False, "exists and is kept even with --force"), (True, "--force does not replace")):
        with pytest.raises(UsageProblem, match=told):
            find_place(place, force, [source], Options())
        with pytest.raises(UsageProblem, match="moeforge did not write it"):
            write_page(TEXT, place, force)
    assert "mine" in place.read_text() and [path.name for path in tmp_path.iterdir() if path.is_file()] == ["page.html"]
    place.write_text("")
    with pytest.raises(UsageProblem, match="--force"):
        find_place(place, False, [source], Options())
    write_page(TEXT, find_place(place, True, [source], Options()), True)
    assert place.read_text() == TEXT


def test_a_page_is_never_put_over_or_into_what_is_read(tmp_path, source):
    (tmp_path / "text.txt").write_text("a text")
    for place, told in {
        source.path / "page.html": "lies inside",
        source.path: "is",
        tmp_path: "contains",
        tmp_path / "text.txt": "is",
    }.items():
        with pytest.raises(UsageProblem, match=told):
            find_place(place, True, [source], Options(text=tmp_path / "text.txt"))


def test_the_command_refuses_before_it_reads_and_prints_numbers_with_json(tmp_path):
    import numpy as np
    from safetensors.numpy import save_file

    (tmp_path / "model").mkdir()
    weight = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    save_file({"model.layers.0.mlp.up_proj.weight": weight}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "taken.html").write_text("mine")
    refused = run("report", "model", "-o", "taken.html", "--text-file", "nothing", cwd=tmp_path)
    assert refused.code == 2 and "moeforge did not write it" in refused.err and refused.out == ""
    for words, name in (((), "report.html"), (("-o", "a/b.html"), "a/b.html")):
        found = json.loads(run("report", "model", "--json", *words, cwd=tmp_path, check=True).out)
        assert found["page"] == str(tmp_path / name) and found["sizes"]["parameters_total"] == 16
        assert (tmp_path / name).read_bytes().startswith(PAGE)
    shown = run("report", "model", cwd=tmp_path, check=True).out
    assert shown.splitlines()[-1] == str(tmp_path / "report.html")
