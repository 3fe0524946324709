"""Shared set-up: keep the checkout's root off sys.path and the machine's plugins out of the tests."""

import os
import sys
from pathlib import Path

import moeforge  # noqa: F401 - first, while the root is still importable; its submodules stay reachable afterwards

ROOT = Path(__file__).resolve().parent.parent

# A folder called `kernels` on sys.path would pass for the Hub's package of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]

os.environ["MOEFORGE_PLUGINS"] = ""
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
