"""The compiled kernels: made by the machine's own C++ compiler when first needed, kept in the user's cache.

The file's name holds a hash of sources, flags, compiler and processor, so a changed one is never mistaken for another, also not in a
home directory that unlike machines share. Compiled under a temporary name and renamed: processes that start at once all end up
with a whole file.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "source"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno")
NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
"""Features of the processor by Linux's names."""


class CannotBuild(Exception):
    """One sentence on why there are no compiled kernels here."""


def folder() -> Path:
    """`$MOEFORGE_HOME/kernels`, by default `~/.cache/moeforge/kernels`."""
    return Path(os.environ.get("MOEFORGE_HOME") or "~/.cache/moeforge").expanduser() / "kernels"


def processor() -> dict[str, str]:
    """What Linux says about the first processor.

    Raises:
        CannotBuild: another system.
    """
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError as error:
        raise CannotBuild("the compiled kernels need Linux on x86-64") from error
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def compiler() -> str:
    """Path of `$CXX` or g++.

    Raises:
        CannotBuild: there is none.
    """
    name = os.environ.get("CXX") or "g++"
    found = shutil.which(name)
    if found is None:
        raise CannotBuild(f"there is no C++ compiler {name} to compile them with (apt install g++)")
    return found


@functools.cache
def library() -> Path:
    """The shared object, compiled if it is not there (seconds, once a machine).

    Raises:
        CannotBuild: the processor, the system or the compiler is in the way.
    """
    cpu = processor()
    features = cpu.get("flags", "").split()
    lacking = [name for name in NEEDED if name not in features]
    if platform.machine() != "x86_64" or lacking:
        raise CannotBuild(f"the processor lacks {', '.join(lacking) or 'AVX-512'}")
    found = compiler()
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    sources = sorted(SOURCE.iterdir())
    key = hashlib.sha256()
    for part in (*FLAGS, found, version, cpu.get("model name", ""), cpu.get("flags", "")):
        key.update(part.encode() + b"\0")
    for path in sources:
        key.update(path.name.encode() + b"\0" + path.read_bytes())
    target = folder() / f"cpu-{key.hexdigest()[:24]}.so"
    if not target.exists():
        _compile(found, target)
    return target


def _compile(found: str, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="building-") as scratch:
            made = Path(scratch) / target.name
            done = subprocess.run(
                [found, *FLAGS, "-o", str(made), str(SOURCE / "library.cpp")],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                last = next((line for line in done.stderr.splitlines() if "error" in line), f"exit {done.returncode}")
                raise CannotBuild(f"{found} could not compile them: {last}")
            made.replace(target)
    except OSError as error:
        raise CannotBuild(f"they could not be written to {target.parent}: {error.strerror}") from error
