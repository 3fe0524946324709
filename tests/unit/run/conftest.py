"""A tiny model with a tokenizer of one letter a token."""

import pytest
from transformers import PreTrainedTokenizerFast

from moeforge.testing.models import SIZES, tiny_dense


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = pre_tokenizers.ByteLevel.alphabet()
    vocab = {"<s>": 0, "</s>": 1} | {
        letter: i + 2 for i, letter in enumerate(sorted(letters)[: SIZES["vocab_size"] - 2])
    }
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<s>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    where = tmp_path_factory.mktemp("model")
    model, _ = tiny_dense("llama")
    model.save_pretrained(where)
    tokenizer.save_pretrained(where)
    return model, where
