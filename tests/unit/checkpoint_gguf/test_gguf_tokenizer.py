"""Tokenizers rebuilt from GGUF: on the real vocabulary of SmolLM2 and on a small SentencePiece one."""

import argparse
import inspect
import itertools
import json
import os
import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from moeforge.checkpoint.gguf import GGUFCheckpoint
from moeforge.checkpoint.gguf_header import read_header
from moeforge.checkpoint.gguf_tokenizer import build_tokenizer, splitters
from moeforge.errors import BadInput
from moeforge.testing.real import smollm2_gguf

SMOL = smollm2_gguf()
TEXTS = [
    *list(pydoc_data.topics.topics.values())[:12],
    inspect.getsource(argparse)[:20000],
    "naïve café ☕ 日本語テスト 😀\u200d🔥 1234567 3.14  \n\n\t x\r\n",
    "Don't you'll WE'RE I'M they'D",
    "   leading and trailing   ",
    "a  b   c    d\n   e",
    "½ ² ٣ Ⅷ 12 foo_bar/baz//x\n/y",
    "",
]
CONFIG = {"max_position_embeddings": 8192}


@pytest.fixture(scope="module")
def smol():
    return read_header(SMOL).metadata


def tokenizer(metadata) -> Tokenizer:
    return Tokenizer.from_str(build_tokenizer(metadata, CONFIG, "test")["tokenizer.json"].decode())


def test_real_model_loads_in_transformers(tmp_path):
    """AutoTokenizer, through the class that a Mixtral config would otherwise choose."""
    from transformers import AutoTokenizer

    with GGUFCheckpoint(SMOL) as source:
        for companion in source.companions():
            (tmp_path / companion.name).write_bytes(companion.read())
        (tmp_path / "config.json").write_text(json.dumps(source.config | {"model_type": "mixtral"}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert len(loaded) == 49152
    assert (loaded.bos_token, loaded.eos_token, loaded.unk_token, loaded.pad_token) == (
        "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end|>")  # fmt: skip
    assert loaded("Hello 123").input_ids == plain.encode("Hello 123").ids, (
        "no special token before: add_bos_token is false"
    )
    for text in TEXTS:
        ids = loaded(text).input_ids
        assert ids == plain.encode(text).ids
        assert loaded.decode(ids) == text
    assert loaded("2024").input_ids == [loaded.convert_tokens_to_ids(digit) for digit in "2024"], "digits one by one"
    chat = loaded.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert loaded(chat).input_ids.count(1) == 3, "the marks of a turn are single tokens"
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize("name", [entry["names"][0] for entry in splitters()["pre"]])
def test_text_is_cut_as_in_llama_cpp(name, smol, tmp_path):
    """Every splitting rule over the same vocabulary, token for token. llama.cpp skips Unicode normalisation, so do the texts."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs the extra `llamacpp`")
    metadata = smol | {"tokenizer.ggml.pre": name}
    writer = GGUFWriter(tmp_path / "v.gguf", "llama")
    for key, value in metadata.items():
        if key.startswith("tokenizer.ggml."):
            value = value.tolist() if isinstance(value, np.ndarray) else value
            kinds = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
            kinds.get(type(value), writer.add_array)(key, value)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file, writer.close):
        step()
    theirs = llama_cpp.Llama(str(tmp_path / "v.gguf"), vocab_only=True, verbose=False)
    ours = tokenizer(metadata)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.tokenize(text.encode(), add_bos=True, special=True), text[:40]


def test_rules_are_those_of_the_models_themselves():
    """Qwen2's and Llama 3's own tokenizers, as transformers builds them."""
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert splitters()["splits"]["qwen2"] == [PRETOKENIZE_REGEX]
    for entry in splitters()["pre"]:
        for regex in splitters()["splits"][entry["split"]]:
            pre_tokenizers.Split(Regex(regex), "isolated").pre_tokenize_str("a b")  # compiles


def test_qwen2_normalises(smol):
    text = "e\u0301 A\u030a"
    assert normalizers.NFC().normalize_str(text) != text
    metadata = smol | {"tokenizer.ggml.pre": "qwen2"}
    assert tokenizer(metadata).encode(text).ids == tokenizer(metadata).encode(normalizers.NFC().normalize_str(text)).ids


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True), (False, False)])
def test_marks_around_a_text(bos, eos, smol):
    metadata = smol | {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    ids = tokenizer(metadata).encode("hello there").ids
    assert (ids[0] == 1, ids[-1] == 2) == (bos, eos)
    pair = tokenizer(metadata).encode("hello", "there").ids
    assert (pair.count(1), pair.count(2)) == (2 * bos, 2 * eos)


def spm_vocabulary(prefix: bool) -> dict:
    """A SentencePiece-like vocabulary: bytes, letters, and pieces with scores that disagree with their numbers."""
    special, raw = ["<unk>", "<s>", "</s>", "<|user|>"], [f"<0x{i:02X}>" for i in range(256)]
    letters = list("▁abcdefghijklmnopqrstuvwxyz.")
    pieces = ["▁t", "he", "▁the", "th", "in", "▁a", "er", "on", "▁th", "an", "re", "nd", "▁and", "the", "ing", "▁i", "▁in", "at",
              "▁▁", "▁▁▁▁", "is", "▁is"]  # fmt: skip
    tokens = special + raw + letters + pieces
    types = [2, 3, 3, 4, *[6] * 256, *[1] * (len(letters) + len(pieces)), 5]
    order = np.random.default_rng(0).permutation(len(pieces))
    scores = [0.0] * (len(special) + len(raw)) + [-1000.0] * len(letters) + [-float(i) for i in order] + [0.0]
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [*tokens, "[PAD]"], "tokenizer.ggml.scores": np.array(scores, np.float32),
            "tokenizer.ggml.token_type": np.array(types), "tokenizer.ggml.add_space_prefix": prefix, "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0}  # fmt: skip


def sentencepiece(text: str, metadata: dict) -> list[int]:
    """The definition: merge the neighbours with the best score, leftmost first, until none is left; then bytes."""
    tokens, scores, types = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    index = {token: i for i, token in enumerate(tokens) if types[i] in (1, 4)}
    parts = list(("▁" if metadata["tokenizer.ggml.add_space_prefix"] and text else "") + text.replace(" ", "▁"))
    while True:
        pairs = [(-scores[index[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in index]
        if not pairs:
            break
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    out = [1]
    for part in parts:
        out += [index[part]] if part in index else [4 + byte for byte in part.encode()]
    return out


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix):
    metadata = spm_vocabulary(prefix)
    ours = tokenizer(metadata)
    rng = np.random.default_rng(1)
    words = ["the", "thing", "and", "in", "a", "is", "there", "  ", "then.", "é", "日", "    ", "attheinside"]
    for _ in range(60):
        text = " ".join(rng.choice(words, rng.integers(1, 9)))
        assert ours.encode(text).ids == sentencepiece(text, metadata), text
        assert ours.decode(ours.encode(text).ids) == text
    assert ours.encode("the<|user|>in").ids[1:].count(3) == 1, "user-defined tokens are found in text"
    assert ours.token_to_id("[PAD]") is None, "unused tokens are not in the vocabulary"


REFUSED = [
    ({"tokenizer.ggml.pre": "brand-new"}, "brand-new"),
    ({"tokenizer.ggml.model": "t5"}, "t5"),
    ({"tokenizer.ggml.merges": None}, "merges"),
    ({"tokenizer.ggml.merges": ["a"]}, "two tokens"),
    ({"tokenizer.ggml.tokens": None}, "tokens"),
    ({"tokenizer.ggml.token_type": np.ones(3)}, "token types"),
    ({"tokenizer.ggml.bos_token_id": 10**6}, "bos_token"),
    ({"tokenizer.ggml.model": "llama"}, "scores"),
]


@pytest.mark.parametrize(("change", "word"), REFUSED)
def test_refuses(change, word, smol):
    with pytest.raises(BadInput, match=word) as caught:
        build_tokenizer(smol | change, CONFIG, "test")
    assert "\n" not in str(caught.value)


def test_no_vocabulary_is_no_tokenizer():
    assert build_tokenizer({"tokenizer.ggml.model": "no_vocab"}, CONFIG, "test") == {}
    assert build_tokenizer({}, CONFIG, "test") == {}


def test_rebuilding_takes_no_torch_and_no_transformers():
    import subprocess
    import sys

    code = (
        "import sys; from moeforge.checkpoint.gguf import GGUFCheckpoint\n"
        f"with GGUFCheckpoint({str(SMOL)!r}) as c: c.companions()\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys([str(Path(__file__).parents[3]), *sys.path]))}
    assert (
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.strip()
        == "[]"
    )
