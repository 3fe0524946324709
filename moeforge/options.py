"""Frozen dataclasses as the one source of options: command line, TOML file, manifest, docs and model card.

    @dataclass(frozen=True)
    class Options:
        experts: int = opt("number of routed experts", default=8, min=2)
        scale: Literal["down", "split"] = opt("where the output scale goes", default="down")
        layers: str = opt("which layers become sparse: all, every:N, last-half, or a list", default="all")
        max_memory: Bytes | None = opt("stop above this much memory", default=None)
        prompt: str = arg("what to continue")

A field name becomes an option with dashes; the type gives its parser (`Literal` a choice, `bool` an on/off pair, `Path`
a path, `Bytes` a size such as `4GiB`, `tuple[X, ...]` a repeatable option). A field without a default is required. Rules
between fields live in `__post_init__` and raise :class:`moeforge.errors.UsageProblem`.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from .errors import UsageProblem

_UNITS = {"": 1, "B": 1, "K": 1000, "KB": 1000, "M": 1000**2, "MB": 1000**2, "G": 1000**3, "GB": 1000**3, "T": 1000**4,
          "TB": 1000**4, "KIB": 1024, "MIB": 1024**2, "GIB": 1024**3, "TIB": 1024**4}  # fmt: skip


class Bytes(int):
    """A size in bytes, written `500MB`, `4GiB` or as a plain number."""

    @classmethod
    def parse(cls, text: str | int) -> Bytes:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
        if match is None or match[2].upper() not in _UNITS:
            raise UsageProblem(f"not a size: {text!r}; write a number with B, KB, MB, GB, TB, KiB, MiB, GiB or TiB")
        return cls(float(match[1]) * _UNITS[match[2].upper()])


def format_bytes(count: float) -> str:
    """`count` bytes for people: `1.38 GB` (decimal units, as disks and the Hub count)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def opt(help: str, *, default: Any = dataclasses.MISSING, unit: str | None = None, min: float | None = None,
        max: float | None = None, short: str | None = None, metavar: str | None = None,
        affects_output: bool = True, reads: bool = False) -> Any:  # fmt: skip
    """An option's dataclass field.

    Args:
        help: one lower-case phrase; shown by `--help`, docs and the model card.
        unit: shown after the help (`bytes`, `tokens`, `s`).
        min, max: inclusive bounds, checked wherever the value comes from.
        short: one-letter alias such as `-n`.
        affects_output: False for options that change speed or display only; they stay out of the artifact's key.
        reads: the value names a file, a directory or a checkpoint that the run reads (implied by the type `Path`): shells
            complete it, and no output is put over it. `NAME=SOMETHING` counts as NAME. What is in it enters the key through
            `Stage.inputs`.
    """
    meta = {"kind": "option", "help": help, "unit": unit, "min": min, "max": max, "short": short, "metavar": metavar,
            "affects_output": affects_output, "reads": reads}  # fmt: skip
    return dataclasses.field(default=default, metadata=meta)


def arg(help: str, *, default: Any = dataclasses.MISSING) -> Any:
    """A positional argument's dataclass field. It follows SRC on the command line, in field order."""
    return dataclasses.field(default=default, metadata={"kind": "argument", "help": help, "affects_output": True})


@dataclasses.dataclass(frozen=True)
class Spec:
    """One field, resolved: what the command line and the TOML reader need to know."""

    name: str
    type: Any
    """The scalar type: str, int, float, bool, Path, Bytes, or a Literal."""
    optional: bool
    many: bool
    default: Any
    meta: Mapping[str, Any]

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def choices(self) -> tuple[str, ...] | None:
        return typing.get_args(self.type) if typing.get_origin(self.type) is Literal else None

    @property
    def reads(self) -> bool:
        return self.type is Path or bool(self.meta.get("reads"))

    @property
    def metavar(self) -> str:
        return self.meta.get("metavar") or self.name.upper().replace("_", "-")

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def convert(self, value: Any) -> Any:
        """`value` (from TOML or the command line) in the field's type.

        Raises:
            UsageProblem: the value does not fit, naming the option, the value and what would fit.
        """
        if value is None:
            if self.optional:
                return None
            raise UsageProblem(f"{self.flag} needs a value")
        if self.many:
            return tuple(self._scalar(v) for v in (value if isinstance(value, list | tuple) else [value]))
        return self._scalar(value)

    def _scalar(self, value: Any) -> Any:
        if self.choices is not None:
            if value not in self.choices:
                raise UsageProblem(f"{self.flag} {value!r}: {did_you_mean(str(value), self.choices)}")
            return value
        if self.type is Bytes:
            try:
                return Bytes.parse(value)
            except UsageProblem as error:
                raise UsageProblem(f"{self.flag}: {error}") from error
        if self.reads:
            if not isinstance(value, str | Path):
                raise UsageProblem(f"{self.flag} is a path, not {value!r}")
            expand(value, self.flag)
            return self.type(value)
        if self.type is bool:
            if not isinstance(value, bool):
                raise UsageProblem(f"{self.flag} is on or off, not {value!r}")
            return value
        if self.type is str and not isinstance(value, str):
            raise UsageProblem(f"{self.flag} is a text, not {value!r}")
        if self.type in (int, float) and isinstance(value, bool):
            raise UsageProblem(f"{self.flag} is a number, not {value!r}")
        try:
            result = self.type(value)
        except (TypeError, ValueError, OverflowError):
            raise UsageProblem(f"{self.flag} {value!r} is not a valid {self.type.__name__}") from None
        if self.type is int and isinstance(value, float) and result != value:
            raise UsageProblem(f"{self.flag} is a whole number, not {value!r}")
        low, high = self.meta.get("min"), self.meta.get("max")
        if isinstance(result, float) and not math.isfinite(result) and result not in (low, high):
            raise UsageProblem(f"{self.flag} {value}: must be a finite number")
        if (low is not None and result < low) or (high is not None and result > high):
            bounds = " and ".join(b for b in (f"at least {low}" if low is not None else "",
                                              f"at most {high}" if high is not None else "") if b)  # fmt: skip
            raise UsageProblem(f"{self.flag} {value}: must be {bounds}")
        return result


def expand(path: str | Path, flag: str) -> Path:
    """`path` with `~` and `~user` replaced by the home directory.

    Raises:
        UsageProblem: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageProblem(f"{flag} {path}: there is no such user; write the directory out") from error


def named_inputs(options: Any) -> list[str]:
    """The values of every option that names something to be read."""
    found = []
    for spec in specs(type(options)):
        value = getattr(options, spec.name)
        if spec.reads and value is not None:
            for name in map(str, value if spec.many else [value]):
                found += [name, name.rpartition("=")[0]] if "=" in name else [name]
    return found


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean X?` when something known is near, else the list of what is known."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else "choose from " + ", ".join(known)


def specs(cls: type) -> list[Spec]:
    """The resolved fields of an options dataclass, in order; what it shares with others (inherits) comes after its own."""
    hints, own = typing.get_type_hints(cls), inspect.get_annotations(cls)
    found = []
    for field in sorted(dataclasses.fields(cls), key=lambda field: field.name not in own):
        hint, optional, many = hints[field.name], False, False
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            inner = [a for a in typing.get_args(hint) if a is not type(None)]
            optional = len(inner) < len(typing.get_args(hint))
            if len(inner) != 1:
                raise TypeError(f"{cls.__qualname__}.{field.name}: only `X | None` unions are options")
            hint = inner[0]
        if typing.get_origin(hint) is tuple:
            many, hint = True, typing.get_args(hint)[0]
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found.append(Spec(field.name, hint, optional, many, default, field.metadata))
    return found


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """An instance of the options dataclass from raw values; converts, checks bounds, then runs `__post_init__`.

    Raises:
        UsageProblem: unknown key, missing required value, wrong type, out of bounds, contradicting fields.
    """
    table = {spec.name: spec for spec in specs(cls)}
    for name in values:
        if name not in table:
            raise UsageProblem(f"unknown option {name!r}: {did_you_mean(name, table)}")
    resolved = {}
    for name, spec in table.items():
        if name in values:
            resolved[name] = spec.convert(values[name])
        elif spec.required:
            raise UsageProblem(f"missing option {spec.flag}: {spec.meta.get('help', '')}")
    return cls(**resolved)


def to_json(options: Any, *, only_affecting_output: bool = False) -> dict[str, Any]:
    """The resolved options as JSON-able values, in field order."""
    out: dict[str, Any] = {}
    for spec in specs(type(options)):
        if only_affecting_output and not spec.meta.get("affects_output", True):
            continue
        value = getattr(options, spec.name)
        if isinstance(value, Path):
            value = str(value)
        elif isinstance(value, tuple):
            value = [str(v) if isinstance(v, Path) else v for v in value]
        elif isinstance(value, Bytes):
            value = int(value)
        out[spec.name] = value
    return out


def read_toml(path: Path) -> dict[str, Any]:
    """A `--config` file: option names with underscores (dashes accepted) at top level.

    Raises:
        UsageProblem: unreadable, not TOML, or holding tables.
    """
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageProblem(f"--config {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageProblem(f"--config {path}: not valid TOML: {error}") from error
    for key, value in data.items():
        if isinstance(value, dict):
            raise UsageProblem(f"--config {path}: [{key}] is a table; options stand at the top level")
    return {key.replace("-", "_"): value for key, value in data.items()}
