"""The reference pages say what the classes say."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from moeforge.options import Bytes, opt, specs

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def build():
    """docs/build.py as a module; the folder is no package."""
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_pages_are_what_the_script_writes(build):
    assert build.outdated(build.pages()) == [], (
        "options or examples changed: run `python docs/build.py` and commit docs/"
    )


def test_a_changed_a_missing_and_a_left_over_page_are_seen(build, monkeypatch, tmp_path):
    pages = build.pages()
    monkeypatch.setattr(build, "ROOT", tmp_path)
    for path, text in pages.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, "utf-8")
    assert build.outdated(pages) == []
    verbs = tmp_path / "docs" / "verbs"
    (verbs / "show.md").write_text((verbs / "show.md").read_text("utf-8").replace("`--tensors`", "`--tensor`"), "utf-8")
    (verbs / "diff.md").unlink()
    (verbs / "shout.md").write_text("# moeforge shout\n", "utf-8")
    assert sorted(path.name for path in build.outdated(pages)) == ["diff.md", "shout.md", "show.md"]


def test_an_option_is_shown_with_type_unit_bounds_default_and_help(build):
    @dataclasses.dataclass(frozen=True)
    class Options:
        names: tuple[str, ...] = opt("which")
        rows: int = opt("rows | a pass", default=4, min=1, max=9, unit="tokens", short="-r")
        size: Bytes = opt("how much", default=Bytes(2_000_000))
        fast: bool | None = opt("hurry", default=None, affects_output=False)

    rows = build.options_table(specs(Options)).splitlines()[2:]
    assert rows == [
        "| `--names` | text, may be repeated | required | which |",
        "| `-r`, `--rows` | whole number, in tokens, 1 to 9 | `4` | rows \\| a pass |",
        "| `--size` | size, such as `500MB` or `4GiB` | 2 MB | how much |",
        "| `--fast` `--no-fast` | on or off | unset | hurry (the result is the same) |",
    ]


def test_every_link_in_the_docs_leads_somewhere(build):
    broken = []
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/*/*.md"),
    ]:
        for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text("utf-8")):
            if "://" not in link and not (page.parent / link).exists():
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert broken == []
