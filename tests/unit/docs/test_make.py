"""examples/make: a real make, run on a tiny model."""

import json
import shutil
import subprocess

import pytest

from moeforge.testing.command import ROOT, environment, moeforge_argv, run

STAGES = ("upcycled", "tuned", "exported")


@pytest.fixture(scope="module")
def make(tiny_with_tokenizer, tmp_path_factory):
    """Run make in a copy of the example, with this interpreter's `moeforge` on PATH."""
    place = tmp_path_factory.mktemp("make")
    for name in ("Makefile", "recipe.toml"):
        shutil.copy(ROOT / "examples" / "make" / name, place)
    # the recipe as it stands would train for seconds on real text; less of it is enough here
    (place / "text.txt").write_text("\n\n".join(f"{n} times {n} is {n * n}" for n in range(200)))
    recipe = (place / "recipe.toml").read_text()
    changed = recipe.replace('["builtin:prose", "builtin:code"]', '["text.txt"]').replace("steps = 20", "steps = 2")
    assert changed != recipe
    (place / "recipe.toml").write_text(changed)
    (place / "bin").mkdir()
    script = place / "bin" / "moeforge"
    script.write_text(f'#!/bin/sh\nexec {" ".join(moeforge_argv())} "$@"\n')
    script.chmod(0o755)

    def go(*words):
        return subprocess.run(["make", f"SRC={tiny_with_tokenizer}", *words], cwd=place, capture_output=True, text=True,
                              env=environment(PATH=f"{place / 'bin'}:/usr/bin:/bin"))  # fmt: skip

    go.place = place
    return go


def manifests(place):
    return {name: json.loads((place / "build" / name / "moeforge.json").read_text()) for name in STAGES}


@pytest.mark.slow
def test_make_runs_what_is_needed_and_nothing_else(make):
    first = make()
    assert first.returncode == 0, first.stderr
    made = manifests(make.place)
    assert [made[name]["verb"] for name in STAGES] == ["upcycle", "tune", "export"]
    assert made["tuned"]["options"]["steps"] == 2

    assert "'build/exported/moeforge.json' is up to date" in make().stdout

    # newer by the clock, equal by content: nothing is computed again, and make is content afterwards
    (make.place / "recipe.toml").touch()
    touched = make()
    assert touched.stderr.count("already done") == 2, touched.stderr
    assert "is up to date" in make().stdout
    assert manifests(make.place) == made

    recipe = make.place / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("steps = 2", "steps = 3"))
    refused = make()
    assert refused.returncode != 0
    assert "--force" in refused.stderr
    again = make("REPLACE=--force")
    assert again.returncode == 0, again.stderr
    assert "moeforge upcycle" not in again.stdout
    now = manifests(make.place)
    assert now["tuned"]["options"]["steps"] == 3
    assert now["upcycled"] == made["upcycled"]
    assert now["tuned"]["digest"] != made["tuned"]["digest"]


def test_make_without_a_source_says_what_is_missing(make):
    refused = subprocess.run(
        ["make", "OUT=elsewhere"], cwd=make.place, capture_output=True, text=True, env=environment()
    )
    assert refused.returncode != 0
    assert "SRC=org/name" in refused.stderr


def test_the_recipe_as_it_stands_is_a_valid_config(tiny_with_tokenizer):
    recipe = ROOT / "examples" / "make" / "recipe.toml"
    upcycled = run("upcycle", tiny_with_tokenizer, "--dry-run", check=True).out
    plan = run("tune", "--config", recipe, "--steps", 7, stdin=upcycled, check=True)
    facts = json.loads(plan.out)["plan"]["facts"]
    assert facts["budget"] == "7 steps"
    assert facts["tokens_a_step"] == 256
