"""tokenizer.json as GGUF metadata: the inverse of `moeforge/checkpoint/gguf_tokenizer.py`, over the same table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moeforge.checkpoint.base import Checkpoint
from moeforge.checkpoint.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    pre_tokenizer,
    splitters,
)
from moeforge.checkpoint.safetensors import parse_json
from moeforge.errors import BadInput

_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def vocabulary(checkpoint: Checkpoint) -> dict[str, Any]:
    """The `tokenizer.*` keys; numpy arrays and lists become GGUF arrays. A checkpoint without tokenizer.json gives a
    file that works on token ids only.

    Raises:
        BadInput: a kind of tokenizer that llama.cpp does not have, or more tokens than embedding rows.
    """
    files = {companion.name: companion for companion in checkpoint.companions()}
    size = checkpoint.tensors["model.embed_tokens.weight"].shape[0]
    if "tokenizer.json" not in files:
        return {"tokenizer.ggml.model": "no_vocab"}
    body, settings, generation = (parse_json(files[name].read(), f"{checkpoint.ref}: {name}") if name in files else {} for name in
                                  ("tokenizer.json", "tokenizer_config.json", "generation_config.json"))  # fmt: skip
    model = body.get("model", {})
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise BadInput(f"{checkpoint.ref}: tokenizer.json holds a {model.get('type')} model; GGUF export writes BPE")
    tokens, types = _tokens(body, size, checkpoint.ref)
    found: dict[str, Any] = {}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    if model.get("byte_fallback"):
        found |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
                  "tokenizer.ggml.scores": _scores(merges, tokens), "tokenizer.ggml.add_space_prefix": _prefixes(body)}  # fmt: skip
    else:
        found |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _recognise(body, checkpoint.ref),
                  "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
                  "tokenizer.ggml.add_space_prefix": False}  # fmt: skip
    found |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": np.array(types, np.int32)}
    index = {token: i for i, token in enumerate(tokens)}
    for name, key in _SPECIAL.items():
        token = settings.get(name)
        token = token.get("content") if isinstance(token, Mapping) else token
        if token in index:
            found[f"tokenizer.ggml.{key}_token_id"] = index[token]
    ends = generation.get("eos_token_id")
    for other in ends if isinstance(ends, list) else []:
        if other != found.get("tokenizer.ggml.eos_token_id"):
            found.setdefault("tokenizer.ggml.eot_token_id", other)
    before, after = _around(body.get("post_processor"))
    found |= {"tokenizer.ggml.add_bos_token": before, "tokenizer.ggml.add_eos_token": after}
    template = _chat_template(settings, files)
    if template is not None:
        found["tokenizer.chat_template"] = template
    return found


def _tokens(body: Mapping[str, Any], size: int, ref: str) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    model = body["model"]
    placed = [(token, i, _type(token, model)) for token, i in model["vocab"].items()]
    placed += [(added["content"], added["id"], USER_DEFINED if not added.get("special") else CONTROL)
               for added in body.get("added_tokens", []) if added["content"] != model.get("unk_token")]  # fmt: skip
    for token, i, kind in placed:
        if i >= size:
            raise BadInput(f"{ref}: token {token!r} is number {i}, the embedding has {size} rows")
        tokens[i], types[i] = token, kind
    return tokens, types


def _type(token: str, model: Mapping[str, Any]) -> int:
    if token == model.get("unk_token"):
        return UNKNOWN
    if model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return BYTE
    return NORMAL


def _scores(merges: list[list[str]], tokens: list[str]) -> np.ndarray:
    """SentencePiece merges the pair with the best score; minus the rank of a token's first merge orders pairs the same."""
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i)
    return np.array([-float(rank.get(token, len(merges))) for token in tokens], np.float32)


def _prefixes(body: Mapping[str, Any]) -> bool:
    """Whether a space goes before a text that does not begin with one."""
    for step in _steps(body.get("normalizer"), "normalizers") + _steps(body.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Prepend" or (
            step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        ):
            return True
    return False


def _steps(body: Mapping[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """A component of tokenizer.json as a flat list, without the settings that change no token."""
    if body is None:
        return []
    if body["type"] == "Sequence":
        return [flat for step in body[inner] for flat in _steps(step, inner)]
    return [{key: value for key, value in body.items() if key != "trim_offsets"}]


def _recognise(body: Mapping[str, Any], ref: str) -> str:
    """The llama.cpp name of this tokenizer's splitting rule."""
    model = body["model"]
    cut = _steps(body.get("pre_tokenizer"), "pretokenizers")
    normal = [step["type"] for step in _steps(body.get("normalizer"), "normalizers")]
    for entry in splitters()["pre"]:
        wanted = _steps(pre_tokenizer(entry), "pretokenizers"), [entry["normalizer"]] if "normalizer" in entry else []
        if (cut, normal) == wanted and bool(model.get("ignore_merges")) == entry.get("ignore_merges", False):
            return entry["names"][0]
    raise BadInput(f"{ref}: tokenizer.json cuts text by a rule that is not one of llama.cpp's known ones "
                   f"({', '.join(entry['names'][0] for entry in splitters()['pre'])})")  # fmt: skip


def _around(processor: Mapping[str, Any] | None) -> tuple[bool, bool]:
    """Whether a special token goes before, and after, a single text."""
    for step in _steps(processor, "processors"):
        if step["type"] == "TemplateProcessing":
            return "SpecialToken" in step["single"][0], "SpecialToken" in step["single"][-1]
    return False, False


def _chat_template(settings: Mapping[str, Any], files: Mapping[str, Any]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].read().decode("utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template
