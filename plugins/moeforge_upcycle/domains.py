"""Text that calibration runs on: files, or what every Python ships with, cut into token sequences without padding."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moeforge.errors import BadInput, UsageProblem
from moeforge.texts import PREFIX, builtin

DEFAULT = ("builtin:prose", "builtin:code")
CHARACTERS = 8
"""Characters cut for each token wanted: more than any usual tokenizer needs for one token of prose or code."""

Encode = Callable[[str], list[int]]
"""Text -> token ids, with the special tokens that the model expects at the start of a text."""


@dataclass(frozen=True)
class Domain:
    """A kind of text, and with several experts perhaps one expert's speciality."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(self.text.encode()).hexdigest()

    def sequences(self, encode: Encode, tokens: int, length: int) -> list[list[int]]:
        """About `tokens` token ids in sequences of at most `length`, from places spread evenly over the text.

        The same text, tokenizer and sizes give the same sequences. Nothing is padded.

        Raises:
            BadInput: not even one sequence of two tokens.
        """
        count = -(-tokens // length)
        window = length * CHARACTERS
        last = max(0, len(self.text) - window)
        starts = sorted({round(i * last / max(1, count - 1)) for i in range(count)})
        found = [encode(self.text[start : start + window])[:length] for start in starts]
        found = [ids for ids in found if len(ids) > 1]
        if not found:
            raise BadInput(f"calibration text {self.name} is shorter than two tokens")
        return found


def load(sources: Sequence[str]) -> list[Domain]:
    """One domain for each source: a text file, or a text of :mod:`moeforge.texts`; without sources, `DEFAULT`.

    Raises:
        UsageProblem: a file that cannot be read as UTF-8 text, an unknown built-in, or a name given twice.
    """
    domains = [_one(source) for source in sources or DEFAULT]
    names = [domain.name for domain in domains]
    for name in names:
        if names.count(name) > 1:
            raise UsageProblem(f"--calibration {name} is given twice; each file is one domain")
    return domains


def _one(source: str) -> Domain:
    if source.startswith(PREFIX):
        return Domain(source, "\n\n".join(text.read() for text in builtin(source, "--calibration")))
    try:
        text = Path(source).expanduser().read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UsageProblem(f"--calibration {source}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise UsageProblem(
            f"--calibration {source}: {error.strerror or error}; give a text file or {DEFAULT[0]}"
        ) from error
    return Domain(source, text)


@dataclass(frozen=True)
class Prompts:
    """What one router row should answer to, and what it should not."""

    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()


def read_prompts(path: Path) -> list[Prompts]:
    """A TOML file with one `[[expert]]` table for each router row: `positive = ["..."]` and, if wanted, `negative = ["..."]`.

    Raises:
        UsageProblem: unreadable, not TOML, or an expert without positive prompts.
    """
    try:
        body = tomllib.loads(path.expanduser().read_text("utf-8"))
    except OSError as error:
        raise UsageProblem(f"--prompts {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageProblem(f"--prompts {path}: not valid TOML: {error}") from error
    tables = body.get("expert")
    if not isinstance(tables, list) or not tables or set(body) != {"expert"}:
        raise UsageProblem(f"--prompts {path}: expected [[expert]] tables and nothing else, found {sorted(body)}")
    found = []
    for number, table in enumerate(tables):
        if not isinstance(table, dict):
            raise UsageProblem(f"--prompts {path}: expert {number} is {table!r}, not a table; write [[expert]] and below it "
                               'positive = ["..."]')  # fmt: skip
        for key, texts in table.items():
            if key not in ("positive", "negative"):
                raise UsageProblem(f"--prompts {path}: expert {number} has {key!r}; known are positive and negative")
            if not isinstance(texts, list) or not all(isinstance(t, str) and t.strip() for t in texts):
                raise UsageProblem(f"--prompts {path}: expert {number}: {key} is not a list of texts")
        if not table.get("positive"):
            raise UsageProblem(f"--prompts {path}: expert {number} has no positive prompts")
        found.append(Prompts(tuple(table["positive"]), tuple(table.get("negative", ()))))
    return found
