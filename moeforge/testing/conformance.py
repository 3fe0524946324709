"""What every stage and method must do, whoever wrote it. A third party's whole test file may be:

    from moeforge.testing.conformance import check_stage

    def test_prune(tmp_path, tiny_model):
        check_stage("prune", tiny_model, ["--share", "0.3"], tmp_path)

Everything goes through the real command in a subprocess, and nothing that a manifest says of itself is taken on trust.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .command import Result, environment, run

HEAVY = ("torch", "transformers", "accelerate", "bitsandbytes")
EXACT = 1e-5
"""Relative logit error in float32 up to which two models are one function."""

_LIGHT = f"""
import sys
sys.argv = ['moeforge', *sys.argv[1:]]
from moeforge.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = [name for name in {HEAVY!r} if name in sys.modules]
assert not heavy, f'imported {{heavy}}'
"""
_ROUND_TRIP = """
import json, sys, tomllib
from moeforge import registry
from moeforge.options import build, specs, to_json
from moeforge.testing.conformance import as_toml
verb, method, stage_options, method_options = json.load(sys.stdin)
found = [(registry.find('moeforge.verbs', verb, 'verb').load(), stage_options)]
if method:
    found.append((registry.find(f'moeforge.{verb}', method, 'method').load(), method_options))
for cls, written in found:
    made = build(cls.Options, written)
    assert to_json(made) == written, f'{cls.__name__}.Options: JSON {written} comes back as {to_json(made)}'
    again = build(cls.Options, tomllib.loads(as_toml(written)))
    assert again == made, f'{cls.__name__}.Options: TOML gives {again}, not {made}'
print(json.dumps([spec.name for cls, _ in found for spec in specs(cls.Options) if spec.meta.get('kind') == 'argument']))
"""


def check_stage(verb: str, src: Path | str, args: Iterable[object] = (), scratch: Path | None = None, *,
                method: str | None = None, exact: bool | None = None, env: dict[str, str] | None = None) -> Result:  # fmt: skip
    """Run the whole suite on one verb (and method) with one set of options.

    Args:
        src: input artifact, small: the verb runs twice on it, and both models are run whole where equality is promised.
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
    check_light([verb, *(["--method", method] if method else []), "--help"], env)
    check_light([*words, "--dry-run"], env)
    plan = check_plan_is_pure(words, scratch, env)
    first = run(*words, "-o", scratch / "first", check=True, env=env)
    manifest = json.loads((scratch / "first" / "moeforge.json").read_text("utf-8"))
    check_manifest(manifest, plan, scratch / "first")
    check_stderr(verb, first)
    if exact is not None:
        assert manifest["verdicts"]["exact"] is exact, f"{verb} promised exact = {manifest['verdicts']['exact']}"
    if manifest["kind"] == "checkpoint":
        check_tensors(plan, scratch / "first")
        promised = manifest["verdicts"].get("exact") is True or plan["verdicts"].get("exact") is True
        check_model(src, scratch / "first", promised, env)
    second = run(*words, "-o", scratch / "second", check=True, env=env)
    assert first.reference["digest"] == second.reference["digest"], f"{verb}: same inputs and seed, other bytes"
    again = run(*words, "-o", scratch / "first", check=True, env=env)
    assert "already done" in again.err, f"{verb}: the same command did its work again instead of reusing the result"
    check_options(verb, src, manifest, scratch, env)
    return first


def check_light(words: Sequence[str], env: Mapping[str, str]) -> None:
    """The command works and imports nothing heavy: `--help`, and any plan."""
    done = subprocess.run([sys.executable, "-P", "-c", _LIGHT, *words], capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, env=environment(**env))  # fmt: skip
    assert done.returncode == 0, f"moeforge {' '.join(words)}: {done.stderr}"


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


def check_stderr(verb: str, result: Result) -> None:
    """Two stages of a pipe share a terminal: every line says whose it is."""
    strange = [line for line in result.err.splitlines() if not line.startswith(f"{verb}: ")]
    assert not strange, f"lines on stderr that do not start with {verb!r}: {strange}"


def check_tensors(plan: dict[str, Any], directory: Path) -> None:
    """The output holds exactly the planned tensors."""
    from ..checkpoint import open_checkpoint

    with open_checkpoint(str(directory)) as checkpoint:
        found = {name: [info.dtype, list(info.shape)] for name, info in checkpoint.tensors.items()}
    assert found == plan["tensors"], "planned and written tensors differ"


def check_model(src: Path | str, directory: Path, exact: bool, env: Mapping[str, str]) -> dict[str, Any]:
    """The output loads as a model that computes numbers, and where equality is promised it is measured again.

    Returns:
        What :mod:`moeforge.testing.remeasure` found.
    """
    argv = [sys.executable, "-P", "-m", "moeforge.testing.remeasure", str(src), str(directory)]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment(**env))
    assert done.returncode == 0, f"{directory} cannot be loaded and run as a model: {done.stderr}"
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["finite"], f"the written model gives infinities or NaN: {found}"
    if exact:
        same = found["relative_error"] <= EXACT and found["argmax_equal"]
        assert same, f"promised to be the same function as {src}, and is not: {found}"
    return found


def check_options(verb: str, src: Path | str, manifest: Mapping[str, Any], scratch: Path, env: dict[str, str]) -> None:
    """The options in a manifest are the run: read back from JSON and TOML they are equal, and as a `--config` file they
    name the artifact that is already there."""
    method, options = manifest.get("method"), {**manifest["options"], **manifest.get("method_options", {})}
    given = json.dumps([verb, method, manifest["options"], manifest.get("method_options", {})])
    done = subprocess.run([sys.executable, "-P", "-c", _ROUND_TRIP], input=given, capture_output=True, text=True,
                          env=environment(**env))  # fmt: skip
    assert done.returncode == 0, f"options of {verb} do not survive being written: {done.stderr}"
    arguments = [options.pop(name) for name in json.loads(done.stdout)]
    config = scratch / "options.toml"
    config.write_text(as_toml({**options, **({"method": method} if method else {})}), "utf-8")
    again = run(verb, src, *arguments, "--config", config, "-o", scratch / "first", check=True, env=env)
    assert "already done" in again.err, f"{verb}: the options in the manifest, as a --config file, are another run"


def as_toml(options: Mapping[str, Any]) -> str:
    """A flat table of JSON-able options as TOML; those that are None are left out, as TOML has no null."""
    # a JSON text, number, truth value or list of these is TOML as it stands
    return "".join(
        f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in options.items() if value is not None
    )
