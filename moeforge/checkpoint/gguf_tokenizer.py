"""tokenizer.json and tokenizer_config.json from a GGUF file's metadata.

Two models exist in the known families: byte-level BPE (`gpt2`), which differs between models only in how text is cut
before merging, and SentencePiece BPE with byte fallback (`llama`), whose merges follow from the scores. Both become plain
JSON for the `tokenizers` library, which is not needed for it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import numpy as np

from ..errors import BadInput

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Values of tokenizer.ggml.token_type."""

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@functools.cache
def splitters() -> dict[str, Any]:
    """`gguf_tokenizers.json`, parsed."""
    return json.loads(resources.files("moeforge.checkpoint").joinpath("gguf_tokenizers.json").read_text("utf-8"))


def encode(body: Any) -> bytes:
    """`body` as the bytes of a JSON file."""
    return (json.dumps(body, indent=2, ensure_ascii=False) + "\n").encode()


def build_tokenizer(metadata: Mapping[str, Any], config: Mapping[str, Any], ref: str) -> dict[str, bytes]:
    """File name -> contents of the tokenizer's files; nothing where the file has no tokenizer.

    Raises:
        BadInput: the tokenizer's model or its splitting rule is not known, or a table is missing or too short.
    """

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    tokens, model = get("tokens"), get("model")
    if model in (None, "no_vocab"):
        return {}
    if not isinstance(tokens, list) or not tokens:
        raise BadInput(f"{ref}: tokenizer.ggml.model is {model!r}, but there are no tokenizer.ggml.tokens")
    types = np.full(len(tokens), NORMAL) if get("token_type") is None else np.asarray(get("token_type"))
    if types.shape != (len(tokens),):
        raise BadInput(f"{ref}: {len(tokens)} tokens but {types.size} token types")
    types = types.tolist()
    if model == "gpt2":
        pre = splitter(get("pre", "default"), ref)
        body = _byte_level(tokens, types, get("merges"), pre, ref)
        add_bos = get("add_bos_token", pre.get("bos", False))
    elif model == "llama":
        pre = {}
        body = _sentencepiece(tokens, types, get("scores"), get("add_space_prefix", True), ref)
        add_bos = get("add_bos_token", True)
    else:
        raise BadInput(f"{ref}: tokenizer.ggml.model = {model!r} is not known; known are gpt2 and llama")

    special = {name: _token(tokens, get(f"{key}_token_id"), name, ref) for name, key in
               {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}.items()}  # fmt: skip
    add_eos = bool(get("add_eos_token", False))
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kind != USER_DEFINED}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]  # fmt: skip
    body["post_processor"] = _template(
        special["bos_token"] if add_bos else None, special["eos_token"] if add_eos else None, tokens
    )
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **body}
    settings: dict[str, Any] = {
        # the generic class: the classes of single models would rebuild the splitting rule by their own
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(add_bos),
        "add_eos_token": add_eos,
    }
    settings |= {name: token for name, token in special.items() if token is not None}
    if isinstance(metadata.get("tokenizer.chat_template"), str):
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    # unindented: json's C encoder, ten times faster on a whole vocabulary
    return {"tokenizer.json": json.dumps(whole, ensure_ascii=False).encode(), "tokenizer_config.json": encode(settings)}


def splitter(name: str, ref: str) -> dict[str, Any]:
    """The splitting rule called `name` in tokenizer.ggml.pre.

    Raises:
        BadInput: not in the table.
    """
    for entry in splitters()["pre"]:
        if name in entry["names"]:
            return entry
    known = ", ".join(entry["names"][0] for entry in splitters()["pre"])
    raise BadInput(
        f"{ref}: tokenizer.ggml.pre = {name!r} is not known (known: {known}); text would be cut in the wrong places"
    )


def pre_tokenizer(pre: Mapping[str, Any]) -> dict[str, Any]:
    """The `pre_tokenizer` of tokenizer.json for an entry of the table."""
    regexes = splitters()["splits"][pre["split"]]
    steps: list[dict[str, Any]] = [{"type": "Digits", "individual_digits": True}] if pre.get("digits") else []
    steps += [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} for regex in regexes
    ]
    steps.append(_BYTE_LEVEL | {"use_regex": not regexes})
    return {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0]


def _byte_level(tokens: list[str], types: list[int], merges: Any, pre: Mapping[str, Any], ref: str) -> dict[str, Any]:
    if not isinstance(merges, list):
        raise BadInput(f"{ref}: no tokenizer.ggml.merges, which a gpt2 tokenizer needs")
    pairs = [merge.split(" ") for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise BadInput(f"{ref}: tokenizer.ggml.merges holds an entry that is not two tokens")
    return {
        "normalizer": {"type": pre["normalizer"]} if "normalizer" in pre else None,
        "pre_tokenizer": pre_tokenizer(pre),
        "decoder": _BYTE_LEVEL | {"add_prefix_space": True},
        "model": _bpe(tokens, types, pairs, ignore_merges=pre.get("ignore_merges", False)),
    }


def _sentencepiece(tokens: list[str], types: list[int], scores: Any, prefix: bool, ref: str) -> dict[str, Any]:
    """SentencePiece merges any two neighbours whose union is a token, best score first, so every way to cut a token in
    two tokens is a merge, ranked by the score of the whole."""
    if np.shape(scores) != (len(tokens),):
        raise BadInput(f"{ref}: {len(tokens)} tokens but {np.size(scores)} scores, which a llama tokenizer needs")
    plain = {
        token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind in (NORMAL, USER_DEFINED)
    }
    ranked = []
    for token, i in plain.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in plain and right in plain:
                ranked.append((-float(scores[i]), i, plain[left], plain[right]))
    ranked.sort()
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    prepend = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*prepend, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}],
        },
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": _bpe(tokens, types, [[tokens[a], tokens[b]] for _, _, a, b in ranked], unk_token=unknown, fuse_unk=True, byte_fallback=True),
    }  # fmt: skip


def _bpe(tokens: list[str], types: list[int], merges: list[list[str]], **settings: Any) -> dict[str, Any]:
    base = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}  # fmt: skip
    # unused tokens only fill the embedding up
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
    return base | settings | {"vocab": vocab, "merges": merges}


def _token(tokens: list[str], index: Any, name: str, ref: str) -> str | None:
    if index is None:
        return None
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise BadInput(f"{ref}: {name} is token {index}, the vocabulary has {len(tokens)}")
    return tokens[index]


def _template(bos: str | None, eos: str | None, tokens: list[str]) -> dict[str, Any] | None:
    """The post-processor that puts `bos` before and `eos` after a text; None when neither is wanted."""
    if bos is None and eos is None:
        return None

    def around(name: str, kind: int) -> list[dict[str, Any]]:
        marks = [[{"SpecialToken": {"id": token, "type_id": kind}}] if token else [] for token in (bos, eos)]
        return [*marks[0], {"Sequence": {"id": name, "type_id": kind}}, *marks[1]]

    ids = {token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]} for token in (bos, eos) if token}
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": ids,
    }
