"""Run a verb in this process, as the command would but without the command's start-up time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import registry
from ..options import build
from ..pipeline.artifact import Artifact, Plan, locate
from ..pipeline.context import Context
from ..pipeline.progress import Progress
from ..pipeline.run import Request, plan_stage, run_stage
from ..pipeline.stage import Bound


@dataclass(frozen=True)
class Done:
    """What a verb left behind."""

    path: Path
    manifest: dict[str, Any]
    artifact: Artifact


def request(verb: str, method: str | None, options: dict[str, Any], output: Path | None = None) -> Request:
    """The request that `moeforge VERB --method METHOD ...` makes; options of verb and method in one dict, as on the line."""
    stage = registry.find("moeforge.verbs", verb, "verb").load()()
    bound, rest = None, dict(options)
    method = method or stage.default_method
    if method is not None:
        loaded = registry.find(f"moeforge.{verb}", method, "method").load()()
        fields = loaded.Options.__dataclass_fields__
        bound = Bound(method, loaded, build(loaded.Options, {name: rest.pop(name) for name in fields if name in rest}))
    return Request(stage, build(stage.Options, rest), bound, output)


def plan(verb: str, src: Path | str, method: str | None = None, **options: Any) -> Plan:
    """The plan of a verb.

    Raises:
        MoeforgeError: the request cannot be met.
    """
    return plan_stage(request(verb, method, options), locate(str(src)))


def run(verb: str, src: Path | str, output: Path, method: str | None = None, **options: Any) -> Done:
    """Run a verb to the end, quietly.

    Raises:
        MoeforgeError: whatever goes wrong.
    """
    context = Context(verb, Progress(verb, "none", quiet=True), home=output.parent / "home")
    outcome = run_stage(request(verb, method, options, output), locate(str(src)), context)
    return Done(output, outcome.manifest, outcome.artifact)
