"""generate with adapters of LoRA experts: one by itself, and several beside their base in one batch."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeforge
from moeforge.errors import BadInput, UsageProblem
from moeforge.options import build
from moeforge.pipeline.artifact import Artifact
from moeforge.pipeline.context import Context
from moeforge.pipeline.progress import Progress
from moeforge.testing import inprocess
from moeforge.testing.command import run
from moeforge_run.generate import Generate
from moeforge_run.requests import Request, adapters_of, requests_of

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def adapters(saved, tmp_path_factory):
    """Name -> directory; away from where they start, so that each says something else."""
    found = {}
    for seed, (name, method, sites) in enumerate(
        [("one", "mixlora", {}), ("two", "custom", {"sites": "q,up", "experts": "1"})]
    ):
        where = tmp_path_factory.mktemp("adapters") / name
        found[name] = path = inprocess.run("attach", saved[1], where, method, rank=4, verify=False, **sites).path
        values, random = load_file(path / WEIGHTS), torch.Generator().manual_seed(seed)
        for value in values.values():
            value += 0.2 * torch.randn(value.shape, generator=random)
        save_file(values, path / WEIGHTS)
    return found


@pytest.fixture
def ask(tmp_path):
    """`ask(ref, prompt, **options)` -> the Answer, in this process."""

    def go(ref, prompt, beside=None, **options):
        ctx = Context("generate", Progress("generate", quiet=True), tmp_path)
        beside = tuple(f"{name}={path}" for name, path in (beside or {}).items())
        options = build(Generate.Options, {"prompt": prompt, "max_new_tokens": 8, "adapter": beside, **options})
        return Generate().answer([Artifact("checkpoint", str(ref), ref)], options, ctx)

    return go


def test_an_adapter_goes_on_as_transformers_says(saved, adapters, tokenizer, ask):
    ids = torch.tensor([tokenizer.encode("hello")])
    out = moeforge.load(str(adapters["one"])).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    found = ask(adapters["one"], "hello").text
    assert found == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert len({found, ask(adapters["two"], "hello").text, ask(saved[1], "hello").text}) == 3


def test_a_prompt_is_continued_by_each_adapter_as_by_it_alone(saved, adapters, ask):
    words = [word for name, path in adapters.items() for word in ("--adapter", f"{name}={path}")]
    found = run("generate", saved[1], "hello", "-n", 8, *words, check=True)
    assert found.out == "".join(f"{name}: {ask(path, 'hello').text}\n" for name, path in adapters.items())
    answers = ask(saved[1], "hello", adapters).data["answers"]
    assert [answer["adapter"] for answer in answers] == ["one", "two"]


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_lines_of_a_file_go_each_to_their_adapter_whatever_the_batch(batch, saved, adapters, ask, tmp_path):
    asked = [("hello there", "two"), ("a", None), ("bc", "one"), ("hello", "two")]
    lines = [json.dumps({"prompt": text} | ({"adapter": name} if name else {})) for text, name in asked]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines) + "\n\n")
    answers = ask(saved[1], f"@{tmp_path / 'asked.jsonl'}", adapters, batch=batch).data["answers"]
    assert [(answer["prompt"], answer["adapter"]) for answer in answers] == asked
    for answer in answers:
        only = ask(adapters[answer["adapter"]] if answer["adapter"] else saved[1], answer["prompt"]).data
        same = ("text", "prompt_tokens", "new_tokens")
        assert {key: answer[key] for key in same} == {key: only[key] for key in same}


def test_a_file_of_prompts_needs_no_adapter_and_each_text_stops_at_its_end(saved, tokenizer, ask, tmp_path):
    prompts = ("ab", "hello")
    asked, where = tmp_path / "asked.jsonl", tmp_path / "ends"
    asked.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    shutil.copytree(saved[1], where)
    rows = [saved[0].generate(torch.tensor([tokenizer.encode(prompt)]), max_new_tokens=8, do_sample=False, pad_token_id=0)[0, len(prompt):].tolist()
            for prompt in prompts]  # fmt: skip
    end = next(token for token in rows[0][:-1] if token not in rows[1])
    (where / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    found, alone = ask(where, f"@{asked}"), [ask(where, prompt) for prompt in prompts]
    assert found.text == "\n".join(f"base: {answer.text}" for answer in alone)
    counts = [answer["new_tokens"] for answer in found.data["answers"]]
    assert counts == [answer.data["new_tokens"] for answer in alone] == [rows[0].index(end) + 1, 8]


def test_a_base_packed_in_4_bits_carries_adapters(saved, adapters, ask, tmp_path):
    small = inprocess.run("compress", saved[1], tmp_path / "small", "nf4", eval=False).path
    packed = {}
    for name, path in adapters.items():
        packed[name] = tmp_path / name
        packed[name].mkdir()
        settings = json.loads((path / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(small)}
        (packed[name] / "adapter_config.json").write_text(json.dumps(settings))
        (packed[name] / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes())
    found = ask(small, "hello", packed)
    assert found.text == "\n".join(f"{name}: {ask(path, 'hello').text}" for name, path in packed.items())


def test_what_is_no_adapter_or_no_base_is_refused(saved, adapters, ask):
    with pytest.raises(UsageProblem, match=f"give {saved[1]} as SRC"):
        ask(adapters["one"], "hi", adapters)
    with pytest.raises(BadInput, match=r"--adapter it=.*: not an adapter of LoRA experts"):
        ask(saved[1], "hi", {"it": saved[1]})


def test_names_and_lines_that_mean_nothing_are_refused(tmp_path):
    assert adapters_of(["a=x/y=z", "b=c"]) == {"a": "x/y=z", "b": "c"}
    for given, told in (
        (["math"], "expected NAME=REF"),
        (["=x"], "expected NAME=REF"),
        (["a=x", "a=y"], "a is x already"),
    ):
        with pytest.raises(UsageProblem, match=told):
            adapters_of(given)
    assert requests_of("@someone said", ["a", "b"]) == [Request("@someone said", "a"), Request("@someone said", "b")]
    path = tmp_path / "asked.jsonl"
    with pytest.raises(BadInput, match="cannot be read"):
        requests_of(f"@{path}", [])
    for line, error, told in (
        ("", BadInput, "no prompts"),
        ("{", BadInput, "asked.jsonl:1: not JSON"),
        ('{"text": "x"}', BadInput, 'expected {"prompt": text}'),
        ('{"prompt": 3}', BadInput, 'expected {"prompt": text}'),
        ('{"prompt": "x", "adapter": "maht"}', UsageProblem, "did you mean 'math'"),
    ):
        path.write_text(line)
        with pytest.raises(error, match=told):
            requests_of(f"@{path}", ["math"])
    with pytest.raises(UsageProblem, match="none is given"):
        requests_of(f"@{path}", [])
