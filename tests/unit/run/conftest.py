"""A tiny model with a tokenizer of one letter a token."""

import pytest

from moeforge.testing.models import tiny_dense, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    where = tmp_path_factory.mktemp("model")
    model, _ = tiny_dense("llama")
    model.save_pretrained(where)
    tokenizer.save_pretrained(where)
    return model, where
