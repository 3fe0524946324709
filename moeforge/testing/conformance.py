"""What every stage and method must do, whoever wrote it. A third party's whole test file may be:

    from moeforge.testing.conformance import check_stage

    def test_prune(tmp_path, tiny_model):
        check_stage("prune", tiny_model, ["--share", "0.3"], tmp_path)

Everything goes through the real command in a subprocess.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .command import Result, environment, run

HEAVY = ("torch", "transformers", "accelerate", "bitsandbytes")


def check_stage(verb: str, src: Path | str, args: Iterable[object] = (), scratch: Path | None = None, *,
                method: str | None = None, exact: bool | None = None, env: dict[str, str] | None = None) -> Result:  # fmt: skip
    """Run the whole suite on one verb (and method) with one set of options.

    Args:
        src: input artifact, small: the verb runs twice on it.
        exact: what the manifest must say of step-0 equality; None not to ask.
        env: extra environment, for instance MOEFORGE_PLUGINS to let a third party's plugin load.

    Returns:
        The first run, for more assertions.

    Raises:
        AssertionError: naming the rule that was broken.
    """
    assert scratch is not None, "pass tmp_path as scratch"
    words = [verb, str(src), *map(str, args), *(["--method", method] if method else [])]
    env = {"MOEFORGE_HOME": str(scratch / "home"), **(env or {})}
    check_light(verb, method, env)
    plan = check_plan_is_pure(words, scratch, env)
    first = run(*words, "-o", scratch / "first", check=True, env=env)
    manifest = json.loads((scratch / "first" / "moeforge.json").read_text("utf-8"))
    check_manifest(manifest, plan, scratch / "first")
    if exact is not None:
        assert manifest["verdicts"]["exact"] is exact, f"{verb} promised exact = {manifest['verdicts']['exact']}"
    if manifest["kind"] == "checkpoint":
        check_tensors(plan, scratch / "first")
    second = run(*words, "-o", scratch / "second", check=True, env=env)
    assert first.reference["digest"] == second.reference["digest"], f"{verb}: same inputs and seed, other bytes"
    again = run(*words, "-o", scratch / "first", check=True, env=env)
    assert "already done" in again.err, f"{verb}: the same command did its work again instead of reusing the result"
    return first


def check_light(verb: str, method: str | None, env: dict[str, str]) -> None:
    """`--help` of the verb (and method) works, shows the method's options, and imports nothing heavy."""
    words = [verb, *(["--method", method] if method else []), "--help"]
    code = (
        "import sys; sys.argv = ['moeforge', *sys.argv[1:]]\n"
        "from moeforge.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "assert not heavy, f'--help imported {heavy}'"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *words], capture_output=True, text=True, env=environment(**env)
    )
    assert done.returncode == 0, done.stderr


def check_plan_is_pure(words: list[str], scratch: Path, env: dict[str, str]) -> dict[str, Any]:
    """`--dry-run --json` prints one plan, writes nothing, and says the same twice."""
    before = sorted(scratch.rglob("*"))
    lines = [run(*words, "--dry-run", "--json", check=True, env=env).out for _ in range(2)]
    assert lines[0] == lines[1], "two dry runs differ"
    assert sorted(scratch.rglob("*")) == before, "a dry run wrote files"
    return json.loads(lines[0])["plan"]


def check_manifest(manifest: dict[str, Any], plan: dict[str, Any], directory: Path) -> None:
    """The manifest names every file, its parents and its options, and keeps the plan's promises."""
    on_disk = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()} - {"moeforge.json"}
    assert set(manifest["files"]) == on_disk, "manifest and directory disagree on the files"
    assert manifest["parents"] and manifest["parents"][0].get("digest"), "no parent with a digest"
    assert manifest["verb"] == plan["verb"]
    for name, promised in plan["verdicts"].items():
        if name == "exact" and promised is True:
            assert manifest["verdicts"][name] is not False, "the plan promised exactness, the run did not keep it"


def check_tensors(plan: dict[str, Any], directory: Path) -> None:
    """The output holds exactly the planned tensors."""
    from ..checkpoint import open_checkpoint

    with open_checkpoint(str(directory)) as checkpoint:
        found = {name: [info.dtype, list(info.shape)] for name, info in checkpoint.tensors.items()}
    assert found == plan["tensors"], "planned and written tensors differ"
