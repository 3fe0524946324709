"""Options: one dataclass for command line, TOML and manifest."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from moeforge import registry
from moeforge.errors import UsageProblem
from moeforge.options import Bytes, build, format_bytes, opt, read_toml, specs, to_json
from moeforge.pipeline.reading import Decoding, Reading


@dataclass(frozen=True)
class Options:
    experts: int = opt("experts", min=2, max=64)
    ratio: float = opt("ratio", default=0.5, min=0.0, max=1.0)
    scale: Literal["down", "split"] = opt("scale", default="down")
    memory: Bytes | None = opt("memory", default=None)
    data: tuple[Path, ...] = opt("data", default=())
    verify: bool | None = opt("verify", default=None)
    temperature: float = opt("temperature", default=1.0)
    limit: float = opt("limit, none by default", default=2.0, min=0, max=float("inf"))
    workers: int = opt("workers", default=2, affects_output=False)

    def __post_init__(self):
        if self.experts == 13:
            raise UsageProblem("--experts 13: unlucky")


def test_values_are_converted_and_come_back_as_json():
    made = build(Options, {"experts": "8", "memory": "4GiB", "data": ["a", "b"], "verify": True})
    assert made == Options(experts=8, memory=Bytes(4 * 2**30), data=(Path("a"), Path("b")), verify=True)
    assert to_json(made)["memory"] == 4 * 2**30
    assert build(Options, to_json(made)) == made
    assert "workers" not in to_json(made, only_affecting_output=True)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({}, "missing option --experts"),
        ({"experts": 8, "expert": 1}, "did you mean 'experts'"),
        ({"experts": 1}, "at least 2 and at most 64"),
        ({"experts": 8, "ratio": float("nan")}, "finite"),
        ({"experts": 8, "ratio": "nan"}, "finite"),
        ({"experts": 8, "temperature": float("inf")}, "finite"),
        ({"experts": 8, "temperature": "-inf"}, "finite"),
        ({"experts": 8, "temperature": float("nan")}, "finite"),
        ({"experts": 8, "limit": float("nan")}, "finite"),
        ({"experts": 8, "limit": -float("inf")}, "finite"),
        ({"experts": float("inf")}, "not a valid int"),
        ({"experts": 8, "data": 5}, "is a path"),
        ({"experts": 8, "data": "~no-such-user-here/x"}, "no such user"),
        ({"experts": 8, "ratio": "half"}, "not a valid float"),
        ({"experts": 8.5}, "whole number"),
        ({"experts": True}, "is a number"),
        ({"experts": 8, "scale": "dwon"}, "did you mean 'down'"),
        ({"experts": 8, "memory": "4 parsecs"}, "--memory: not a size: '4 parsecs'"),
        ({"experts": 8, "verify": "yes"}, "on or off"),
        ({"experts": 8, "workers": None}, "needs a value"),
        ({"experts": 13}, "unlucky"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_option_named(values, word):
    with pytest.raises(UsageProblem, match=word):
        build(Options, values)


def test_only_a_bound_of_infinity_lets_infinity_through():
    assert build(Options, {"experts": 8, "limit": "inf"}).limit == float("inf")


def test_toml_takes_dashes_and_refuses_tables(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text('experts = 8\nmax-memory = "1GB"\n')
    assert read_toml(file) == {"experts": 8, "max_memory": "1GB"}
    file.write_text("[upcycle]\nexperts = 8\n")
    with pytest.raises(UsageProblem, match=r"\[upcycle\] is a table"):
        read_toml(file)
    file.write_text("experts = ")
    with pytest.raises(UsageProblem, match="not valid TOML"):
        read_toml(file)
    with pytest.raises(UsageProblem, match="No such file"):
        read_toml(tmp_path / "none.toml")


@pytest.mark.parametrize(("text", "count"), [("12", 12), ("1.5GB", 1_500_000_000), ("2 KiB", 2048), ("3M", 3_000_000)])
def test_sizes(text, count):
    assert Bytes.parse(text) == count


def test_sizes_for_people():
    assert [format_bytes(n) for n in (0, 999, 1500, 1.38e9, 5e12)] == ["0 B", "999 B", "1.5 kB", "1.38 GB", "5 TB"]


def test_specs_know_what_is_required():
    assert [s.name for s in specs(Options) if s.required] == ["experts"]


def test_inherited_options_are_shared_and_come_last():
    @dataclass(frozen=True)
    class Mine(Decoding):
        to: Literal["hf", "gguf"] = opt("required, though what is inherited has defaults")
        share: float = opt("of the weights", default=0.5)

    assert [spec.name for spec in specs(Mine)] == ["to", "share", "allow_pickle", "dequantize"]
    made = build(Mine, {"to": "gguf", "allow_pickle": True})
    assert made == Mine("gguf", allow_pickle=True)
    assert list(to_json(made).items()) == [
        ("to", "gguf"), ("share", 0.5), ("allow_pickle", True), ("dequantize", False),
    ]  # fmt: skip


def test_every_verb_that_can_read_pickles_asks_in_the_same_words():
    wanted = {spec.name: spec for spec in specs(Reading)}["allow_pickle"]
    asked = {
        name: spec
        for name in registry.entries("moeforge.verbs")
        for spec in specs(registry.find("moeforge.verbs", name, "verb").load().Options)
        if spec.name == "allow_pickle"
    }
    assert {"upcycle", "compress", "export", "show", "verify", "diff", "eval", "generate"} <= asked.keys()
    assert {name: spec for name, spec in asked.items() if spec != wanted} == {}
