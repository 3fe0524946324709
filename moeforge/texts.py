"""Real text that is on every machine, under one set of names: what `--data`, `--calibration` and evaluation accept as
`builtin:NAME`. No torch.

    builtin:prose   the language reference that `help()` prints: 465 kB of English in every CPython
    builtin:code    the standard library's own modules
    builtin:legal   licence texts, on Debian and Ubuntu
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .errors import BadInput, UsageProblem
from .options import did_you_mean

PREFIX = "builtin:"
_LICENCES = Path("/usr/share/common-licenses")


@dataclass(frozen=True)
class Text:
    """One document.

    Attributes:
        key: where it comes from, for messages: `prose:with`.
        size: bytes, or an estimate; only for plans.
        changed: time of the file's last change in nanoseconds, 0 where there is no file.
    """

    key: str
    size: int
    read: Callable[[], str]
    changed: int = 0


def builtin(spec: str, option: str) -> list[Text]:
    """The documents of `builtin:NAME`, in a fixed order.

    Args:
        option: the flag that asked, for the message.

    Raises:
        UsageProblem: there is no such text, or not on this machine.
    """
    if spec not in NAMES:
        raise UsageProblem(f"{option} {spec}: there is no such built-in text; {did_you_mean(spec, NAMES)}")
    found = list(_SOURCES[spec.removeprefix(PREFIX)]())
    if not found:
        raise UsageProblem(
            f"{option} {spec}: {_LICENCES} is not on this machine (it comes with Debian and Ubuntu); name a file"
        )
    return found


def read_text(path: Path) -> str:
    """A file as UTF-8.

    Raises:
        BadInput: it cannot be read, or is not UTF-8: letters that a guess would turn into others are not to be learnt.
    """
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path}: the byte 0x{error.object[error.start]:02x} at offset {error.start} is not UTF-8; "
            "convert the file, for example with iconv -f latin1 -t utf-8"
        ) from error


def whole_file(path: Path, key: str) -> Text:
    """A file as one document."""
    status = path.stat()
    return Text(key, status.st_size, partial(read_text, path), status.st_mtime_ns)


def _prose() -> Iterator[Text]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Text(f"prose:{name}", len(text), partial(str, text))


def _code() -> Iterator[Text]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield whole_file(path, f"code:{path.name}")


def _legal() -> Iterator[Text]:
    if _LICENCES.is_dir():
        for path in sorted(p for p in _LICENCES.iterdir() if p.is_file() and not p.is_symlink()):
            yield whole_file(path, f"legal:{path.name}")


_SOURCES: dict[str, Callable[[], Iterator[Text]]] = {"prose": _prose, "code": _code, "legal": _legal}
NAMES = tuple(PREFIX + name for name in _SOURCES)
