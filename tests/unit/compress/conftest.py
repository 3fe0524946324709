"""Run the stage in this process: plan, write, close."""

from types import SimpleNamespace

import pytest

from moeforge.options import build
from moeforge.pipeline.artifact import Artifact
from moeforge.pipeline.context import Context
from moeforge.pipeline.progress import Progress
from moeforge.pipeline.stage import Bound
from moeforge_compress.stage import Compress


@pytest.fixture(scope="session")
def compress_at():
    def run(source, out, method, chosen, *, counts=None, **options):
        options = build(Compress.Options, {"eval": False, **options})
        bound = Bound(method.name, method(), build(method.Options, chosen))
        plan = Compress().plan(Artifact("checkpoint", str(source), source), options, bound)
        out.mkdir()
        space = SimpleNamespace(path=out, journal=None)
        written = Compress().run(plan, space, Context("compress", Progress("compress", quiet=True), out.parent))
        if counts is not None:
            counts.update(written.counts)

    return run


@pytest.fixture
def compress(compress_at, tmp_path):
    def run(source, method, chosen, **how):
        out = tmp_path / f"made-{len(list(tmp_path.iterdir()))}"
        compress_at(source, out, method, chosen, **how)
        return out

    return run
