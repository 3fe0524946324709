"""Refusals before a run begins, and of the Hub when something is pushed: no token is ever repeated."""

import re

import pytest
from huggingface_hub import errors
from huggingface_hub.utils import validate_repo_id

from moeforge.errors import BadInput, UsageProblem
from moeforge.hub import hub_errors


def test_an_artifact_of_a_kind_that_the_verb_does_not_take(join, artifact, tmp_path):
    source = artifact(kind="calibration")
    with pytest.raises(BadInput, match=rf"^join takes checkpoint, but {re.escape(str(source))} is a calibration$"):
        join(source, tmp_path / "out")
    assert join.stage.runs == 0 and not (tmp_path / "out").exists()


def test_a_push_without_a_token():
    error = errors.LocalTokenNotFoundError("Token is required (hf_abcdefghijklmnopqrstuvwx)")
    told = r"^push to org/m: no token; run `hf auth login` or set HF_TOKEN$"
    with pytest.raises(UsageProblem, match=told), hub_errors("push to org/m"):
        raise error


def test_a_push_to_a_name_that_is_none():
    secret = "hf_abcdefghijklmnopqrstuvwx"
    with (
        pytest.raises(UsageProblem, match=r"^push to it: Repo id must .*'org/\.\.hf_\*\*\*'") as caught,
        hub_errors("push to it"),
    ):
        validate_repo_id(f"org/..{secret}")
    assert secret not in str(caught.value) and "\n" not in str(caught.value)
