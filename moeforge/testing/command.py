"""Run the real `moeforge` command in a subprocess, as a user or a shell would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moeforge

ROOT = Path(moeforge.__file__).resolve().parent.parent


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def reference(self) -> dict[str, Any]:
        """The artifact reference on stdout."""
        return json.loads(self.out.splitlines()[-1])

    @property
    def path(self) -> Path:
        return Path(self.reference["path"])


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child process: importable packages, no Hub, no third-party plugins unless asked."""
    mine = extra.pop("PYTHONPATH", "")
    paths = [mine, str(ROOT), str(ROOT / "plugins"), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1",
            "MOEFORGE_PLUGINS": "", "OMP_NUM_THREADS": "1", **extra}  # fmt: skip


def moeforge_argv(*args: object) -> list[str]:
    """The command line of the interpreter that runs now: `python -m moeforge ARGS`, without the working directory on
    sys.path."""
    return [sys.executable, "-P", "-m", "moeforge", *map(str, args)]


def run(*args: object, stdin: str | None = "", env: dict[str, str] | None = None, cwd: Path | None = None,
        check: bool = False, timeout_s: float = 300) -> Result:  # fmt: skip
    """Run `moeforge ARGS` and collect what it did.

    Raises:
        AssertionError: `check` and the exit code is not 0; shows stderr.
    """
    done = subprocess.run(moeforge_argv(*args), input=stdin, capture_output=True, text=True, cwd=cwd,
                          env=environment(**(env or {})), timeout=timeout_s)  # fmt: skip
    result = Result(done.returncode, done.stdout, done.stderr)
    if check and result.code != 0:
        raise AssertionError(f"moeforge {' '.join(map(str, args))} ended with {result.code}:\n{result.err}")
    return result
