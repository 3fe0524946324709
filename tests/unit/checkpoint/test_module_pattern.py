"""Patterns of module names: peft's answers, and none that hangs."""

import random
import re

import pytest

from moeforge.checkpoint.module_pattern import matches_tail
from moeforge.errors import BadInput

MODULES = [
    f"model.layers.{n}.{part}" for n in (0, 1, 2, 11) for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
]
TAKEN = [
    "q_proj", "layers.1.self_attn.q_proj", r"layers\.[02]\.mlp\.up_proj", r".*\.mlp\.(up|down)_proj", "model.layers.11.mlp.up_proj",
    r"layers\.\d+\.mlp.*", "^model.layers.1.mlp.up_proj", r"(?:up|down)_proj", r"(?P<which>up|q)_proj$", r"layers\.\d{1,2}\.\w+\.up_proj",
    "roj", "proj|up_proj", r"[^.]+_proj", "",
]  # fmt: skip


def peft_says(pattern, module):
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


@pytest.mark.parametrize("pattern", TAKEN)
def test_agrees_with_pefts_rule(pattern):
    found = [matches_tail(pattern, module, "it") for module in MODULES]
    assert found == [peft_says(pattern, module) for module in MODULES]


def test_the_patterns_tell_modules_apart():
    found = [sum(matches_tail(pattern, module, "it") for module in MODULES) for pattern in TAKEN]
    assert {0, 1} < set(found) and any(1 < n < len(MODULES) for n in found)


@pytest.mark.parametrize("pattern", [
    "(a+)+b", "(a|a)*b", "(a*)*b", "(?:a+){9}b", "(a|aa)+c", "a*" * 200 + "b", "(a|a)" * 150 + "b", ".*" * 300 + "b", "(.*a){20}b",
    "((a+)b?)*c", "(a?){200}b", "((a{1,99}){1,99}){1,99}b",
])  # fmt: skip
def test_patterns_that_hang_in_re_are_answered(pattern):
    assert not matches_tail(pattern, "a" * 150, "it")
    matches_tail(pattern, "a" * 149 + "b", "it")


@pytest.mark.parametrize(
    "pattern", [r"(\w*)\1b", "(?=a)ab", "(?P<x>a)(?P=x)b", "(?i:a)b", "(?i)a", r"\bq", "((((a*)*)*)*)*b", "(?<!a)b"]
)
def test_what_is_not_matched_here_is_refused(pattern):
    with pytest.raises(BadInput, match=r"^it: .* is not matched here: write names"):
        matches_tail(pattern, "a" * 40, "it")


def test_size_is_bounded():
    for pattern, module in (("a" * 1001, "x"), ("a", "x" * 301)):
        with pytest.raises(BadInput, match="at most 1000 and 300"):
            matches_tail(pattern, module, "it")
    for pattern in ("(", "a{2,1}", "(" * 499 + ")" * 400, "*"):
        with pytest.raises(BadInput, match=r"it is not a regular expression"):
            matches_tail(pattern, "x", "it")


@pytest.mark.filterwarnings("ignore:Possible")
@pytest.mark.parametrize("seed", range(300))
def test_any_text_is_matched_as_peft_does_or_refused(seed):
    rng = random.Random(seed)
    pattern = "".join(rng.choice(["a", ".", "*", "+", "?", "(", ")", "|", "[", "]", "\\", "{2}", "^", "(?", "x"]) for _ in range(rng.randint(1, 9)))  # fmt: skip
    for module in ("a.x", "x.a.a", "aaxa"):
        try:
            found = matches_tail(pattern, module, "it")
        except BadInput:
            continue
        assert found == peft_says(pattern, module), (pattern, module)
