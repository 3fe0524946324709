"""The house rules that a reader relies on: one-way imports, no shadowing packages, every plugin shipped."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

MAY_IMPORT = {
    "moeforge_kernels": set(),
    "moeforge.checkpoint": set(),
    "moeforge.mixture": {"moeforge_kernels"},
    "moeforge.model": {
        "moeforge_kernels",
        "moeforge.mixture",
        "moeforge.checkpoint",
        "moeforge.registry",
        "moeforge.pipeline",
    },
    "moeforge.train": {
        "moeforge.model",
        "moeforge.mixture",
        "moeforge.checkpoint",
        "moeforge.pipeline",
        "moeforge.texts",
    },
    "moeforge.texts": set(),
    "moeforge.report": {"moeforge.checkpoint", "moeforge.options", "moeforge.pipeline"},
    "moeforge.pipeline": {"moeforge.checkpoint", "moeforge.options", "moeforge.registry", "moeforge"},
    "moeforge.launch": {"moeforge.pipeline", "moeforge.registry"},
    "moeforge.verb": {"moeforge.pipeline", "moeforge.registry", "moeforge.launch"},
    "moeforge.cli": {"moeforge.verb", "moeforge.launch", "moeforge.registry", "moeforge.pipeline", "moeforge"},
    "moeforge.registry": {"moeforge.options"},
    "moeforge.auto": {"moeforge.model"},
    "moeforge.options": set(),
    "moeforge.errors": set(),
}
LEAVES = {"moeforge.errors", "moeforge.options"}
"""What everyone may import."""


def modules():
    for base in ("moeforge", "kernels", "plugins"):
        root = ROOT if base == "moeforge" else ROOT / base
        for path in sorted((ROOT / base).rglob("*.py")):
            yield path, ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imported(path, name):
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            # `from . import x` and `from .. import x` name modules; so may `from moeforge import x`
            yield from (
                [f"{module}.{a.name}" for a in node.names] if not node.module or module == "moeforge" else [module]
            )


def area(module):
    parts = module.split(".")
    if parts[0] != "moeforge":
        return parts[0]
    if len(parts) == 1 or parts[1] in ("__version__", "__main__"):
        return "moeforge"
    return ".".join(parts[:2])


def violations(rules, found):
    for name, targets in found:
        mine = area(name)
        for target in targets:
            theirs = area(target)
            if not theirs.startswith("moeforge") or theirs == mine or theirs in LEAVES:
                continue
            if mine in rules and theirs not in rules[mine]:
                yield f"{name} imports {target}"
            elif mine.startswith("moeforge_") and theirs.startswith("moeforge_") and theirs != "moeforge_kernels":
                yield f"plugin {name} imports plugin {target}"


def test_imports_go_one_way():
    found = [(name, list(imported(path, name))) for path, name in modules()]
    assert len(found) > 20
    assert list(violations(MAY_IMPORT, found)) == []


def test_the_import_check_sees_a_violation():
    bad = [("moeforge.checkpoint.x", ["moeforge.model.load"]), ("moeforge_tune.stage", ["moeforge_upcycle.recipe"])]
    assert len(list(violations(MAY_IMPORT, bad))) == 2


@pytest.mark.parametrize("folder", ["kernels", "plugins"])
def test_no_package_shadows_the_hub(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def test_every_plugin_is_in_the_wheel():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "packages"
    ]
    assert set(packages) == {
        "moeforge",
        "kernels/moeforge_kernels",
        *(f"plugins/{p.name}" for p in (ROOT / "plugins").glob("moeforge_*")),
    }


def test_no_python_file_grows_beyond_reading():
    long = {
        str(path.relative_to(ROOT)): lines
        for path, _ in modules()
        if (lines := len(path.read_text("utf-8").splitlines())) > 450
    }
    assert long == {}
