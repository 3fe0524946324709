"""generate: the text is transformers' own, whatever the prompt goes through."""

import json

import pytest
import torch

import moeforge
from moeforge.errors import BadInput, MachineLacks, UsageProblem
from moeforge.options import build
from moeforge.pipeline.artifact import Artifact
from moeforge.pipeline.context import Context
from moeforge.pipeline.progress import Progress
from moeforge.testing import inprocess
from moeforge.testing.command import run
from moeforge.testing.models import save_tiny
from moeforge_run.generate import Generate, check_length, encode

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture
def answer(saved, tmp_path):
    def go(prompt, **options):
        ctx = Context("generate", Progress("generate", quiet=True), tmp_path)
        options = build(Generate.Options, {"prompt": prompt, "max_new_tokens": 12, **options})
        return Generate().answer([Artifact("checkpoint", str(saved[1]), saved[1])], options, ctx)

    return go


def test_greedy_text_is_that_of_transformers(answer, saved, tokenizer):
    ids = torch.tensor([tokenizer.encode("hello there")])
    out = saved[0].generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    found = answer("hello there")
    assert found.text == found.data["text"] == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert found.data["prompt_tokens"] == ids.shape[1]
    assert 0 < found.data["new_tokens"] <= 12
    assert found.data["tokens_per_second"] > 0


def test_sampling_depends_on_the_seed_alone(answer):
    hot = {"temperature": 5.0, "top_p": 0.99}
    first, second, other = (answer("abc", seed=seed, **hot).text for seed in (1, 1, 2))
    assert first == second != other
    assert answer("abc").text not in (first, other)


def test_the_chat_template_is_used_when_there_is_one(tokenizer):
    assert encode(tokenizer, "hi", None) == tokenizer.encode("hi")
    with pytest.raises(UsageProblem, match="no chat template"):
        encode(tokenizer, "hi", True)
    tokenizer.chat_template = TEMPLATE
    try:
        assert tokenizer.decode(encode(tokenizer, "hi", None)) == "<user>hi<a>"
        assert tokenizer.decode(encode(tokenizer, "hi", False)) == "hi"
    finally:
        tokenizer.chat_template = None
    with pytest.raises(BadInput, match="empty"):
        encode(tokenizer, "", None)


@pytest.mark.parametrize("options", [{"top_p": 0.5}, {"top_p": 0.0, "temperature": 1.0}, {"temperature": float("nan")}])
def test_sampling_options_that_mean_nothing_are_refused(options):
    with pytest.raises(UsageProblem):
        build(Generate.Options, {"prompt": "x", **options})


def test_stdout_holds_the_text_and_nothing_else(saved, answer):
    wanted = answer("abc", max_new_tokens=4).text
    plain = run("generate", saved[1], "abc", "-n", 4)
    assert plain.code == 0, plain.err
    assert plain.out == wanted + "\n"
    found = json.loads(run("generate", "abc", "-n", 4, "--json", stdin=f"{saved[1]}\n", check=True).out)
    assert found["text"] == wanted


def test_a_text_longer_than_the_model_knows_is_refused(answer, saved, tokenizer):
    limit, prompt = saved[0].config.max_position_embeddings, len(tokenizer.encode("hello"))
    assert answer("hello", max_new_tokens=limit - prompt).data["prompt_tokens"] == prompt
    with pytest.raises(
        UsageProblem, match=f"{prompt} tokens and --max-new-tokens 99999 .* = {limit}; .* -n {limit - prompt}$"
    ):
        answer("hello", max_new_tokens=99999)
    with pytest.raises(UsageProblem, match=rf"max_position_embeddings = {limit}; shorten the prompt"):
        answer("a" * limit, max_new_tokens=1)


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_compressed_mixture_goes_on_as_it_is_loaded(method, saved, tokenizer, tmp_path):
    """Its config.json stands in front of the mixture's own."""
    moe = inprocess.run("upcycle", saved[1], tmp_path / "moe", "copy", experts=4, verify=False).path
    made = inprocess.run("compress", moe, tmp_path / "small", method, eval=False).path
    assert json.loads((made / "config.json").read_text())["model_type"] == "moeforge"
    ids = torch.tensor([tokenizer.encode("hello")])
    out = moeforge.load(made).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    found = run("generate", made, "hello", "-n", 8, check=True)
    assert found.out == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) + "\n"
    limit = saved[0].config.max_position_embeddings
    assert f"max_position_embeddings = {limit}" in run("generate", made, "hello", "-n", 9999).err


def test_the_limit_goes_by_the_name_that_the_family_gives_it():
    check_length(9, 1, {"model_type": "gpt2", "n_positions": 10})
    with pytest.raises(UsageProblem, match="= 10"):
        check_length(9, 2, {"model_type": "gpt2", "n_positions": 10})
    check_length(9, 10**6, {"model_type": "mamba"})


@pytest.mark.parametrize(
    ("options", "error"),
    [({"device": "nowhere"}, UsageProblem), ({"dtype": "foo"}, UsageProblem), ({"device": "cuda:99"}, MachineLacks)],
)
def test_a_device_or_type_that_is_not_there_is_refused(answer, options, error):
    with pytest.raises(error, match="|".join(options.values())):
        answer("hi", **options)


def test_a_checkpoint_without_a_tokenizer_is_refused_by_what_can_be_done(tmp_path):
    ctx = Context("generate", Progress("generate", quiet=True), tmp_path)
    where = save_tiny(tmp_path / "bare", "llama")
    with pytest.raises(BadInput, match="no tokenizer files, so text means nothing to it; copy them beside its weights"):
        Generate().answer([Artifact("checkpoint", str(where), where)], build(Generate.Options, {"prompt": "hi"}), ctx)
