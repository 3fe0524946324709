"""The model card says what the manifest says, and nothing of the machine it was made on."""

import json

import pytest

from moeforge.report.card import lineage, model_card, public_manifest, sources

SOURCE = {"ref": "org/dense", "revision": "a" * 40, "license": "apache-2.0", "digest": "sha256:1"}
OTHER = {"ref": "/home/me/models/other", "license": "llama3.1", "digest": "sha256:2"}


def manifest(**changes):
    upcycled = {
        "verb": "upcycle", "method": "btx", "reference": "arXiv 2403.07816", "options": {"experts": 8, "seed": None},
        "verdicts": {"exact": True, "proof": "same function: relative error 4.0e-07"}, "parents": [SOURCE, OTHER],
    }  # fmt: skip
    return {
        "schema": 1, "kind": "checkpoint", "verb": "compress", "method": "nf4", "reference": "arXiv 2305.14314",
        "options": {"eval": True, "cache": "/home/me/cache/x"}, "method_options": {"blocksize": 64}, "digest": "sha256:abc",
        "files": {"model.safetensors": {"bytes": 1_500_000}}, "parents": [{"ref": "/home/me/moe", "manifest": upcycled}],
        "counts": {"perplexity": 12.3456, "bytes_by_role": {"experts": {"nf4": 1_000_000}}}, "warnings": ["mind the gap"],
        "verdicts": {"exact": False, "portability": {"moeforge": "exact", "transformers": "unsupported"}},
        "versions": {"moeforge": "9.9"}, "timings": {"seconds": 1.5},
    } | changes  # fmt: skip


def test_every_parent_and_licence_and_number_is_told():
    card = model_card(manifest(), {"model_type": "moeforge"}, "org/made")
    front, body = card.split("---\n")[1], card.split("---\n", 2)[2]
    assert "license: other" in front  # two parents, two licences
    assert "- org/dense" in front
    assert "base_model_relation: quantized" in front
    for text in ("upcycle", "btx", "arXiv 2403.07816", "nf4", "arXiv 2305.14314", "apache-2.0", "llama3.1", "12.35", "1 MB nf4",
                 "4.0e-07", "mind the gap", "moeforge.load(\"org/made\")", "`experts` 8", "sha256:abc", "9.9"):  # fmt: skip
        assert text in body, text
    assert body.index("**upcycle**") < body.index("**compress**")
    assert "computes the same function" in body
    assert "does not compute the same function" in body
    assert "AutoModelForCausalLM" not in body


def test_a_promise_is_not_called_a_proof():
    steps = manifest()
    steps["parents"][0]["manifest"]["verdicts"] = {"exact": True, "verified": False, "why_not_verified": "--no-verify"}
    card = model_card(steps, {}, "org/made")
    assert "by construction; not proven on the files (--no-verify)" in card


def test_one_licence_goes_to_the_front_and_a_native_result_shows_transformers():
    lone = manifest(parents=[SOURCE], verb="export", method=None)
    card = model_card(lone, {"model_type": "mixtral"}, "org/made")
    assert "license: apache-2.0" in card
    assert 'AutoModelForCausalLM.from_pretrained("org/made")' in card


def test_a_parent_without_a_licence_is_called_unknown():
    card = model_card(manifest(parents=[{"ref": "/data/x.gguf"}]), None, "org/made")
    assert "- `x.gguf`: unknown" in card
    assert "license: other" in card


def test_no_path_of_this_machine_leaves_it():
    public = json.dumps(public_manifest(manifest())) + model_card(manifest(), {}, "org/made")
    assert "/home/" not in public
    assert '"other"' in public


@pytest.mark.parametrize("hostile", ["a: b\nlicense: mit", 'x"y', "- z", "yes: no"])
def test_front_matter_stays_yaml(hostile):
    import yaml

    card = model_card(manifest(parents=[{"ref": "org/m", "license": hostile}]), {}, "org/made")
    assert yaml.safe_load(card.split("---\n")[1])["license"] == " ".join(hostile.split())


def test_lineage_runs_back_to_the_first_source():
    steps = list(lineage(manifest()))
    assert [step["verb"] for step in steps] == ["compress", "upcycle"]
    assert [parent["ref"] for parent in sources(steps)] == ["org/dense", "/home/me/models/other"]


def test_licences_of_every_branch_and_of_an_adapters_base():
    tuned = {"ref": "/data/tuned", "manifest": {"verb": "tune", "parents": [{"ref": "org/third", "license": "gemma"}]}}
    adapter = {"ref": "org/lora", "license": "mit", "base": {"ref": "org/base", "license": "cc-by-nc-4.0"}}
    card = model_card(manifest(parents=[SOURCE, tuned, adapter]), None, "org/made")
    for line in (
        "- `org/third`: gemma",
        "- `org/lora`: mit",
        "- `org/base`: cc-by-nc-4.0",
        "- `org/dense@aaaaaaaaaaaa`: apache-2.0",
    ):
        assert line in card, line
    assert "base_model:\n- org/dense\n- org/third\n- org/lora\n- org/base" in card


def test_numbers_of_every_step_are_kept():
    body = manifest()
    body["parents"][0]["manifest"]["counts"] = {"held_out_loss": 2.125}
    card = model_card(body, None, "org/made")
    assert "| upcycle | held out loss | 2.125 |" in card
    assert "| compress | perplexity | 12.35 |" in card


def test_a_manifest_with_little_in_it_still_makes_a_card():
    card = model_card(
        {"kind": "checkpoint", "files": {"a": {}}, "counts": {"bytes_by_role": {"x": 1}}, "timings": {}},
        None,
        "org/made",
    )
    assert card.startswith("---\n") and "unknown" in card


def test_a_teacher_is_no_base_model_and_its_licence_counts():
    teacher = {
        "ref": "org/lora",
        "license": "gemma",
        "role": "teacher",
        "base": {"ref": "org/large", "license": "llama3.1"},
    }
    tuned = manifest(verb="tune", method=None, reference=None, parents=[SOURCE, teacher])
    card = model_card(tuned, {"model_type": "mixtral"}, "org/made")
    assert "base_model:\n- org/dense\ntags:" in card and "license: other" in card
    assert "Made from `org/dense@aaaaaaaaaaaa` by" in card
    assert "**tune** from `org/dense@aaaaaaaaaaaa`, taught by `org/lora`:" in card
    assert "- `org/lora`: gemma" in card and "- `org/large`: llama3.1" in card
    # the dense parent may well teach what was made of it
    assert "base_model:\n- org/dense\ntags:" in model_card(
        tuned | {"parents": [SOURCE, SOURCE | {"role": "teacher"}]}, {}, "org/made"
    )
