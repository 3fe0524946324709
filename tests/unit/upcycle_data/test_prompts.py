"""The first token of a sequence is not measured; no word of a prompt may be lost by that without a word about it."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from moeforge.checkpoint import open_checkpoint
from moeforge.errors import UsageProblem
from moeforge.testing import inprocess
from moeforge_upcycle.domains import read_prompts
from moeforge_upcycle.measure import encoder, starting_encoder

GATE = "model.layers.{}.block_sparse_moe.gate.weight"


class Context:
    """Keeps what it is told."""

    def __init__(self):
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)


@pytest.fixture
def routed(tmp_path):
    count = iter(range(100))

    def run(source, *prompts):
        path = tmp_path / f"prompts{next(count)}.toml"
        path.write_text("".join(f"[[expert]]\npositive = {list(texts)}\n" for texts in prompts))
        return inprocess.run("upcycle", source, path.with_suffix(""), "copy", experts=len(prompts), top_k=1,
                             router_init="prompts", prompts=path, verify=False)  # fmt: skip

    return run


@pytest.mark.parametrize(("special", "start"), [(("bos", "eos"), [1]), (("eos",), [2]), (("bos",), [1]), ((), [])])
def test_a_text_begins_with_a_token_that_is_no_word(spoken, special, start):
    ctx = Context()
    with open_checkpoint(str(spoken(1, special=special))) as checkpoint:
        found, plain = starting_encoder(checkpoint, ctx)("of the"), encoder(checkpoint)("of the")
    assert found == [*start, 5, 3]
    assert plain == ([1] if "bos" in special else []) + [5, 3]
    assert len(ctx.warnings) == (not start)


@pytest.mark.parametrize("special", [("bos", "eos"), ("eos",)])
def test_prompts_of_one_word_are_heard(spoken, routed, special):
    """Every word counts: other words, other rows; the row of a word answers to it."""
    source = spoken(1, special=special)
    one = load_file(routed(source, ["the"], ["go"]).path / "model.safetensors")
    two = load_file(routed(source, ["of"], ["go"]).path / "model.safetensors")
    for layer in range(3):
        first, second = one[GATE.format(layer)], two[GATE.format(layer)]
        assert np.isfinite(first).all() and first.any()
        assert not np.allclose(first[0], second[0], rtol=1e-2)


@pytest.mark.parametrize("body", ["expert = [1, 2]", 'expert = ["write code", "tell a story"]', "expert = [[1]]"])
def test_prompts_that_are_no_tables_are_refused(tmp_path, body):
    (tmp_path / "p.toml").write_text(body)
    with pytest.raises(UsageProblem, match=r"p\.toml: expert 0 is .*, not a table; write \[\[expert\]\]"):
        read_prompts(tmp_path / "p.toml")


def test_a_prompt_of_which_nothing_is_measured_is_named(spoken, routed):
    with pytest.raises(UsageProblem, match="expert 1: 'go' is 1 token"):
        routed(spoken(1, special=()), ["the of to"], ["a in", "go"])
