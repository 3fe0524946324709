"""Small checkpoints, and queries run in this process."""

import io
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from moeforge import options as forge_options
from moeforge.pipeline.artifact import locate
from moeforge.pipeline.context import Context
from moeforge.pipeline.progress import Progress


@pytest.fixture
def ask(tmp_path):
    """Run a Query class on references: `ask(Show, ref, tensors=True)`."""

    def run(query, *refs, **values):
        stage = query()
        ctx = Context(stage.name, Progress(stage.name, "none", True, io.StringIO()), tmp_path)
        answer = stage.answer([locate(str(ref)) for ref in refs], forge_options.build(stage.Options, values), ctx)
        json.dumps(answer.data, allow_nan=False)
        return answer

    return run


@pytest.fixture
def checkpoint(tmp_path):
    """Write a directory that opens as a checkpoint: `checkpoint("a", {name: array}, **config)`."""

    def write(name, tensors, **config):
        directory = tmp_path / name
        directory.mkdir()
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, directory / "model.safetensors",
                  {"format": "pt"})  # fmt: skip
        (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
        return directory

    return write
