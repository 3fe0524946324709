"""Tiny artifacts of every kind, and `report` run on them in this process."""

import io
import json
from html.parser import HTMLParser

import pytest

from moeforge import options as forge_options
from moeforge.pipeline.artifact import locate
from moeforge.pipeline.context import Context
from moeforge.pipeline.progress import Progress
from moeforge.testing import inprocess
from moeforge.testing.models import tiny_dense, tiny_tokenizer
from moeforge_inspect.report import Report

VOID = {"meta", "br", "link", "img", "input", "hr"}


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """dense; moe (Mixtral's layout) and own (ours) of it; tuned (on two labels), small (compressed), attached and adapter (tuned)."""
    place = tmp_path_factory.mktemp("report")
    tiny_dense("llama")[0].save_pretrained(place / "dense")
    tiny_tokenizer().save_pretrained(place / "dense")
    for kind, text in {"wine": "bottles of ", "code": "x = 1\n"}.items():
        lines = (json.dumps({"text": f"{i} {text * (i % 5 + 1)}"}) + "\n" for i in range(40))
        (place / f"{kind}.jsonl").write_text("".join(lines))
    data = tuple(str(place / f"{kind}.jsonl") for kind in ("wine", "code"))
    short = {"data": data, "sequence_length": 32, "batch_size": 2, "learning_rate": 1e-2, "held_out": 0.3, "steps": 4}
    up = {"experts": 4, "top_k": 2, "verify": False}
    inprocess.run("upcycle", place / "dense", place / "moe", "noise", **up)
    inprocess.run("upcycle", place / "dense", place / "own", "noise", target="moeforge", **up)
    inprocess.run("tune", place / "moe", place / "tuned", routing_every=2, **short)
    inprocess.run("compress", place / "tuned", place / "small", "nf4", eval=False)
    inprocess.run("attach", place / "dense", place / "attached", "mola", rank=4, verify=False, experts="1,2,3")
    inprocess.run("tune", place / "attached", place / "adapter", **short)
    return place


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """`report(ref, text="...")` -> the answer; what it says is valid JSON."""

    def run(ref, **values):
        context = Context("report", Progress("report", "none", True, io.StringIO()), tmp_path_factory.getbasetemp())
        answer = Report().answer([locate(str(ref))], forge_options.build(Report.Options, values), context)
        json.dumps(answer.data, allow_nan=False)
        return answer

    return run


class Elements(HTMLParser):
    """The elements of a page, in order, refused where they do not nest."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.found, self.open, self.texts = [], [], {}
        self.feed(page)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, name, attributes):
        assert len({key for key, _ in attributes}) == len(attributes), f"{name} has an attribute twice"
        self.found.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append((name, len(self.found) - 1))

    def handle_endtag(self, name):
        assert self.open and self.open[-1][0] == name, f"</{name}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, text):
        if self.open:
            at = self.open[-1][1]
            self.texts[at] = self.texts.get(at, "") + text

    def named(self, name):
        """(attributes, text) of every element of a name."""
        return [(about, self.texts.get(at, "")) for at, (tag, about) in enumerate(self.found) if tag == name]


@pytest.fixture
def elements():
    return Elements
