"""A small model that reads and writes text, for commands that the docs show."""

import pytest

from moeforge.testing.models import SIZES, save_tiny


@pytest.fixture(scope="session")
def tiny_with_tokenizer(tmp_path_factory):
    """A three-layer Llama with a letter-by-letter tokenizer, on disk."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    directory = save_tiny(tmp_path_factory.mktemp("docs") / "dense", "llama")
    # printable ASCII sorts first, so the small vocabulary holds every letter of an English prompt
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: SIZES["vocab_size"] - 4]
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", "th", *letters])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h")], unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)
    return directory
