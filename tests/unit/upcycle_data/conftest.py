"""Layers made of arrays, tiny checkpoints with a tokenizer, and a second implementation of what calibration measures."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moeforge_upcycle.recipe import Layer, LayerStats
from moeforge_upcycle.router import keyed

WORDS = "the a of to in is it on as at by an be or if so we he do no up go".split()


@pytest.fixture
def layer():
    """(parents, stats=...) -> a Layer whose parents are dicts of gate, up [F, D] and down [D, F] arrays."""

    def make(parents, *, stats=None, seed=0, index=0) -> Layer:
        first = parents[0]["gate"]
        return Layer(
            index=index,
            model_width=first.shape[1],
            ffn_width=first.shape[0],
            read=lambda matrix, parent: parents[parent][matrix].astype(np.float32),
            rng=lambda word: keyed(seed, "layer", index, word),
            stats=tuple(stats or [None] * len(parents)),
        )

    return make


def random_ffn(seed: int, width: int = 24, model: int = 10) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"gate": (width, model), "up": (width, model), "down": (model, width)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def ffn():
    return random_ffn


def apply_ffn(ffn: dict[str, np.ndarray], x: np.ndarray, neurons=slice(None)) -> np.ndarray:
    """float64 SwiGLU of some neurons: x [N, D] -> [N, D]."""
    gate, up, down = (ffn[name].astype(np.float64) for name in ("gate", "up", "down"))
    hidden = x @ gate[neurons].T
    hidden = hidden / (1 + np.exp(-hidden)) * (x @ up[neurons].T)
    return hidden @ down[:, neurons].T


@pytest.fixture
def swiglu():
    return apply_ffn


@pytest.fixture
def blobs():
    """Stats of tokens that fall into well separated domains around a large common mean."""

    def make(domains=4, each=50, width=12, seed=0, common=5.0) -> LayerStats:
        rng = np.random.default_rng(seed)
        centres = np.linalg.qr(rng.standard_normal((width, width)))[0][:domains] * 3
        labels = np.repeat(np.arange(domains), each)
        x = centres[labels] + 0.5 * rng.standard_normal((len(labels), width)) + common
        return LayerStats(
            samples=x.astype(np.float32),
            labels=labels,
            domain_sums=np.stack([x[labels == d].sum(0) for d in range(domains)]),
            domain_counts=np.full(domains, each),
            gram=x.T @ x,
        )

    return make


@pytest.fixture(scope="session")
def spoken(tmp_path_factory):
    """(name, seed, **overrides) -> directory of a tiny Llama with a word-level tokenizer of its vocabulary."""
    from moeforge.testing.models import save_tiny

    def make(seed: int = 0, family: str = "llama", words=None, special=("bos", "eos"), **overrides):
        directory = save_tiny(tmp_path_factory.mktemp("spoken"), family, seed, **overrides)
        write_tokenizer(directory, words or WORDS, special)
        return directory

    return make


def write_tokenizer(directory, words, special_tokens=("bos", "eos")) -> None:
    """`special_tokens`: which of bos and eos it has; with bos it begins every text with it."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {word: 3 + i for i, word in enumerate(words)}
    special = [{"id": i, "content": c, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False} for c, i in list(vocab.items())[:3]]  # fmt: skip
    body = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                           {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                           {"Sequence": {"id": "B", "type_id": 0}}],
                           "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": None, "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }  # fmt: skip
    if "bos" not in special_tokens:
        body["post_processor"] = None
    (directory / "tokenizer.json").write_text(json.dumps(body))
    names = {f"{kind}_token": token for kind, token in (("bos", "<s>"), ("eos", "</s>")) if kind in special_tokens}
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names})
    )
