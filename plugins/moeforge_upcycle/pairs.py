"""Which dense family becomes which mixture without changing the function: `pairs/<model_type>.json`.

    source    the dense model type (for the reader)
    require   predicates that hold for every target below
    pairs     in order of preference: {"target", "require": predicates, "config": keys that differ from the layout's own}
    never     {"target" or "*", "key", "because"}: why some target (or every one) cannot hold this family

`_any.json` holds `require` and `never` of every family. A predicate that fails names the config key that breaks exactness.
`--allow-inexact` turns it into a recorded warning, unless it is `fatal`.

A third party adds a family, or targets of a family that we have, under the entry-point group `moeforge.upcycle_pairs` (see
moeforge_upcycle.described).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from moeforge.checkpoint.dense_config import written_as
from moeforge.errors import BadInput
from moeforge.pipeline.artifact import Problem

from . import described, targets
from .predicates import Predicate, fill, lookup
from .targets import Target


@dataclass(frozen=True)
class Pair:
    """One dense family and one layout that can hold it."""

    source: str
    target: Target
    require: tuple[Predicate, ...]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Never:
    """Why a target cannot hold a family, whatever its config says."""

    target: str
    key: str
    because: str


@dataclass(frozen=True)
class Match:
    """The chosen pair for one model."""

    pair: Pair
    dropped: frozenset[str]
    """Tensor roles that are left out: all zero, or allowed by `--allow-inexact`."""
    allowed: tuple[Problem, ...]
    """What `--allow-inexact` let pass."""
    passed_over: tuple[Problem, ...]
    """Why targets that come earlier in the order of preference were not taken."""


@functools.cache
def load(source: str) -> tuple[tuple[Pair, ...], tuple[Never, ...]]:
    """The native pairs of a dense family in order of preference, and the targets that can never hold it.

    Empty where nobody has described how this family becomes one.
    """
    common = described.find("pairs", "_any")[0]  # ours
    found = described.find("pairs", source)
    pairs = []
    with described.parsing("pairs", source):
        for raw in found:
            for item in raw.get("pairs", ()):
                rules = (*common["require"], *raw.get("require", ()), *item.get("require", ()))
                require = tuple(map(Predicate.parse, rules))
                pairs.append(Pair(source, targets.load(item["target"]), require, item.get("config", {})))
        never = [Never(**item) for raw in (*found, common) for item in raw.get("never", ())]
    return tuple(pairs), tuple(never)


def choose(
    source: str,
    settings: Mapping[str, Any],
    wanted: str,
    *,
    fits: Callable[[Target], Problem | None],
    is_zero: Callable[[Collection[str]], bool],
    ours: Pair,
    allow_inexact: bool = False,
) -> Match:
    """The pair to use for a model of family `source`.

    Args:
        settings: the resolved config.
        wanted: a target's name, or `auto`: the first in order of preference that holds this model exactly and fits; ours after all
            native ones.
        fits: what the request itself (sparse layers, shared expert, ...) asks of a layout that it lacks, if anything.
        is_zero: whether all tensors of these roles hold only zeros.
        ours: this family in the layout of our own runtime.

    Raises:
        BadInput: no exact target; names the config key and value in the way.
    """
    pairs, never = load(source)
    passed: list[Problem] = []
    for rule in never:
        if rule.target == wanted or (rule.target == "*" and not pairs):
            problem = Problem(written_as(rule.key, settings), lookup(settings, rule.key), rule.because)
            if wanted in ("auto", ours.target.model_type):
                passed.append(problem)
                continue
            into = "any native mixture" if rule.target == "*" else rule.target
            raise BadInput(f"{source} cannot become {into}: {problem}{_instead((*pairs, ours), rule.target)}")
    if wanted == ours.target.model_type:
        pairs, passed = (ours,), []
    elif wanted != "auto":
        targets.load(wanted)
        if all(pair.target.model_type != wanted for pair in pairs):
            raise BadInput(f"{source} cannot become {wanted}: model_type = {source!r}: the two compute different "
                           f"functions{_instead((*pairs, ours), wanted)}")  # fmt: skip
        pairs = tuple(pair for pair in pairs if pair.target.model_type == wanted)
    second_best: Match | None = None
    for pair in pairs:
        problems, dropped, lost = check(pair, settings, is_zero)
        unfit = fits(pair.target)
        if unfit is not None:
            passed.append(unfit)
        elif not problems:
            return Match(pair, dropped, (), tuple(passed))
        else:
            passed += problems
            if not any(problem.fatal for problem in problems):
                second_best = second_best or Match(pair, dropped | lost, tuple(problems), ())
    if allow_inexact and second_best is not None:
        return second_best
    if wanted == "auto":
        problems, _, _ = check(ours, settings, is_zero)
        if not problems:
            nobody = Problem("model_type", source, "no native mixture is known that computes the same function")
            return Match(ours, frozenset(), (), tuple(passed or [nobody]))
        passed += problems
    advice = "; --allow-inexact goes on and records it" if second_best is not None else ""
    if wanted not in ("auto", ours.target.model_type) and not check(ours, settings, is_zero)[0]:
        advice += f"; --target {ours.target.model_type} holds it exactly"
    whole = f"{source} cannot become {wanted}" if wanted != "auto" else f"no target holds this {source} model"
    raise BadInput(f"{whole} exactly: {'; '.join(dict.fromkeys(map(str, passed)))}{advice}")


def check(
    pair: Pair, settings: Mapping[str, Any], is_zero: Callable[[Collection[str]], bool]
) -> tuple[list[Problem], frozenset[str], frozenset[str]]:
    """(what breaks exactness, roles that are all zero and may go, roles that would be lost)."""
    problems, dropped, lost = [], set(), set()
    for rule in pair.require:
        if rule.holds(settings):
            continue
        if rule.drops and is_zero(rule.drops):
            dropped |= set(rule.drops)
            continue
        lost |= set(rule.drops)
        key = written_as(rule.key, settings)
        problems.append(Problem(key, lookup(settings, rule.key), rule.because, fatal=rule.fatal))
    return problems, frozenset(dropped), frozenset(lost)


def output_config(pair: Pair, settings: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the mixture. `settings`: the dense model's; `values`: what the mixture adds ($experts, $width, ...).

    Rotary and dtype keys are written in both dialects, so that older readers do not fall back to their defaults.
    """
    target, names = pair.target, {**settings, **values}
    rope = dict(settings["rope"])
    flat = {key: value for key, value in rope.items() if key != "rope_theta"}
    partial = flat["partial_rotary_factor"]
    scaling = {key: value for key, value in flat.items() if key != "partial_rotary_factor"}
    dtype = values["dtype"]
    return {
        "architectures": [target.architecture],
        "model_type": target.model_type,
        **{key: names[key] for key in target.copies},
        **fill({**target.config, **pair.config}, names),
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if flat["rope_type"] == "default" else scaling,
        "partial_rotary_factor": partial,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _instead(pairs: tuple[Pair, ...], target: str) -> str:
    names = [pair.target.model_type for pair in pairs if pair.target.model_type != target]
    return f"; it can become {', '.join(names)}" if names else ""
