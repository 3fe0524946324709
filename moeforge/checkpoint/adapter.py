"""A PEFT LoRA adapter merged over its base while it is read: W + scale B A, in float32, rounded once.

Source: LoRA (arXiv 2106.09685); rsLoRA's alpha / sqrt(r) (arXiv 2312.03732); DoRA's column norm (arXiv 2402.09353).
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import BadInput
from .base import Checkpoint
from .folder import Folder
from .low_rank import BLOCK, product_rows, whole_blocks
from .module_pattern import matches_tail
from .safetensors import SafetensorsFile, parse_json, read_header
from .tensor import FLOATS, NUMPY_DTYPES, Companion, Extent, TensorInfo

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
               "chat_template.jinja", "vocab.json", "merges.txt")  # fmt: skip
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base's weights as they are; the others (pissa, olora, loftq, ...) subtract from them."""
_REFUSED = {"use_qalora": "QA-LoRA", "layer_replication": "layer replication", "alora_invocation_tokens": "activated LoRA",
            "lora_bias": "biases on B", "target_parameters": "LoRA on parameters", "trainable_token_indices": "trained tokens",
            "arrow_config": "Arrow routing", "monteclora_config": "MonteCLoRA", "velora_config": "VeLoRA"}  # fmt: skip
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class _Delta:
    """One adapted matrix: names of its tensors in the adapter's file."""

    a: str
    b: str
    scale: float
    magnitude: str | None


class OpenBase(Protocol):
    """How the base checkpoint is opened: by path or Hub id."""

    def __call__(self, base: str, revision: str | None = None) -> Checkpoint: ...


class MergedAdapter(Checkpoint):
    """The checkpoint that `merge_and_unload` would make, without making it.

    Args:
        path: directory with adapter_config.json and adapter_model.safetensors.
        open_base: opens the checkpoint that the adapter says it was trained on; it is closed with this one.
        ref: how the user named it; default the path.
        revision: the commit, for a snapshot of a Hub repository.

    Raises:
        BadInput: not a LoRA adapter, of a variant that does not merge into the weights, or one that does not fit `base`.
    """

    def __init__(self, path: Path, *, open_base: OpenBase, ref: str | None = None, revision: str | None = None):
        self.root, self.ref, self._revision = path, ref or str(path), revision
        self._folder = folder = Folder(path, self.ref)
        self._settings = settings = parse_json(folder.read(CONFIG), f"{self.ref}: {CONFIG}")
        _refuse(settings, self.ref)
        names = folder.names()
        if WEIGHTS not in names:
            pickled = "adapter_model.bin" in names
            hint = "; adapter_model.bin is pickled and not read, save it as safetensors" if pickled else ""
            raise BadInput(f"{self.ref}: no {WEIGHTS}{hint}")
        weights, where = folder.file(WEIGHTS), f"{self.ref}: {WEIGHTS}"
        self._file = SafetensorsFile(weights, read_header(weights, where), where)
        self.base = _open_base(path, settings, open_base)
        try:
            self._fit()
        except BaseException:
            self.close()
            raise

    def _fit(self) -> None:
        """Find the place of every tensor of the adapter in the base."""
        base = self.base
        self.config: dict[str, Any] = dict(base.config)
        self._deltas: dict[str, _Delta] = {}
        self._replaced: dict[str, str] = {}
        tensors = dict(base.tensors)
        for stored, info in self._file.header.tensors.items():
            self._sort(stored, info, tensors)
        if not self._deltas and not self._replaced:
            raise BadInput(f"{self.ref}: {WEIGHTS} adapts nothing")
        self.tensors: Mapping[str, TensorInfo] = tensors

    def _sort(self, stored: str, info: TensorInfo, tensors: dict[str, TensorInfo]) -> None:
        """Find the place of one of the adapter's tensors."""
        name = stored.removeprefix(_PREFIX).replace(".base_layer.", ".")  # a trained bias of an adapted module
        if not stored.startswith(_PREFIX) or "lora_embedding" in name or info.dtype not in FLOATS:
            what = "LoRA on an embedding" if "lora_embedding" in name else f"{info.dtype} tensor"
            raise BadInput(f"{self.ref}: {stored!r}: {what} is not merged; merge it with peft first")
        if name.endswith((".lora_B.weight", ".lora_magnitude_vector")):
            return  # with its A
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            self._deltas[module + ".weight"] = self._delta(stored, module)
            return
        if name not in self.base.tensors:
            if name == "lm_head.weight" and self.config.get("tie_word_embeddings"):
                self._tied(stored)
                return
            raise BadInput(
                f"{self.ref}: {stored!r} has no counterpart in the base {self.base.ref}; was the adapter trained on another?"
            )
        shape = self.base.tensors[name].shape
        if info.shape != shape:
            if name not in _VOCABULARY or info.shape[1:] != shape[1:]:
                raise BadInput(f"{self.ref}: {stored!r} is {list(info.shape)}, the base's {name!r} {list(shape)}")
            self.config["vocab_size"] = info.shape[0]
        self._replaced[name] = stored
        tensors[name] = replace(self.base.tensors[name], shape=info.shape)

    def _tied(self, stored: str) -> None:
        """peft saves a resized embedding twice when it is tied; two different ones are not tied any more."""
        twin = _PREFIX + _VOCABULARY[0]
        if twin not in self._file.header.tensors or not np.array_equal(self._file.read(stored), self._file.read(twin)):
            raise BadInput(f"{self.ref}: {stored!r} was trained apart from the embedding, but the base has tie_word_embeddings = true; "
                           "untie the base first")  # fmt: skip

    def _delta(self, a: str, module: str) -> _Delta:
        have, target = self._file.header.tensors, self.base.tensors.get(module + ".weight")
        b = a.replace(".lora_A.weight", ".lora_B.weight")
        magnitude = a.replace(".lora_A.weight", ".lora_magnitude_vector")
        if target is None:
            raise BadInput(
                f"{self.ref}: adapts {module!r}, which the base {self.base.ref} does not have; was it trained on another?"
            )
        if b not in have:
            raise BadInput(f"{self.ref}: {a!r} stands without its {b!r}")
        expected = target.shape[::-1] if self._settings.get("fan_in_fan_out") else target.shape
        rank = have[a].shape[0] if len(have[a].shape) == 2 else 0
        if not rank or have[b].shape[1:] != (rank,) or (*have[b].shape[:1], *have[a].shape[1:]) != expected:
            raise BadInput(f"{self.ref}: {module!r}: B {list(have[b].shape)} A {list(have[a].shape)} does not fit the base's "
                           f"{list(target.shape)}")  # fmt: skip
        if target.dtype not in FLOATS:
            raise BadInput(
                f"{self.ref}: the base's {module}.weight is {target.dtype}, a quantised type; dequantise the base first"
            )
        wanted = _pattern(self._settings.get("rank_pattern"), module, self._settings.get("r"), self.ref)
        if wanted != rank:
            raise BadInput(f"{self.ref}: {module!r} has rank {rank}, {CONFIG} says {wanted}")
        alpha = _pattern(self._settings.get("alpha_pattern"), module, self._settings.get("lora_alpha"), self.ref)
        if not isinstance(alpha, int | float):
            raise BadInput(f"{self.ref}: lora_alpha is {alpha!r} for {module!r}")
        if magnitude in have and have[magnitude].shape != target.shape[:1]:
            raise BadInput(
                f"{self.ref}: {magnitude!r} is {list(have[magnitude].shape)}, not one for each row of {list(target.shape)}"
            )
        scale = alpha / (math.sqrt(rank) if self._settings.get("use_rslora") else rank)
        return _Delta(a, b, scale, magnitude if magnitude in have else None)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        if name not in self.tensors:
            raise BadInput(f"{self.ref}: no tensor {name!r}")
        dtype = NUMPY_DTYPES[self.tensors[name].dtype]
        delta = self._deltas.get(name)
        if name in self._replaced:
            base = self._file.read(self._replaced[name], rows)
        else:
            base = self.base.read(name, rows)
        if delta is None:
            return base.astype(dtype, copy=False)
        wide = np.dtype(np.float64 if base.dtype == np.float64 else np.float32)
        start, stop, _ = (rows or slice(None)).indices(self.tensors[name].shape[0])
        merged = self._product(delta, start, stop, wide)
        merged += base
        if delta.magnitude is not None:
            size = self._file.read(delta.magnitude, rows).astype(wide)
            merged *= (size / np.linalg.norm(merged, axis=1))[:, None]
        return merged.astype(dtype, copy=False)

    def _product(self, delta: _Delta, start: int, stop: int, wide: np.dtype) -> np.ndarray:
        """Rows `start` to `stop` of scale B A."""
        blocks = whole_blocks(start, stop)
        if self._settings.get("fan_in_fan_out"):  # the base holds (B A)^T = A^T B^T
            left, right = self._file.read(delta.a).T[blocks], self._file.read(delta.b).T
        else:
            left, right = self._file.read(delta.b, blocks), self._file.read(delta.a)
        return product_rows(left.astype(wide), right.astype(wide), delta.scale, start, stop)

    def read_memory(self, name: str, nbytes: int) -> int:
        if name in self._replaced:
            return 2 * max(
                nbytes,
                self._file.header.tensors[self._replaced[name]].nbytes * nbytes // max(1, self.tensors[name].nbytes),
            )
        base, delta = self.base.read_memory(name, nbytes), self._deltas.get(name)
        if delta is None:
            return base
        parts = self._file.header.tensors
        info, factors = self.tensors[name], parts[delta.a].nbytes + parts[delta.b].nbytes
        # float32 or float64: the sum, a block, and for DoRA the squares; of the factors what is stored and its wide copy
        item = 8 if info.dtype == "F64" else 4
        count = nbytes // NUMPY_DTYPES[info.dtype].itemsize + BLOCK * math.prod(info.shape[1:])
        return max(base, 2 * nbytes + 2 * item * count + factors + item * (parts[delta.a].size + parts[delta.b].size))

    def extent(self, name: str) -> Extent | None:
        if name in self._deltas:
            return None
        if name not in self._replaced:
            return self.base.extent(name)
        same = self._file.header.tensors[self._replaced[name]].dtype == self.tensors[name].dtype
        return self._file.extent(self._replaced[name]) if same else None

    def companions(self) -> Sequence[Companion]:
        found = {companion.name: companion for companion in self.base.companions()}
        found |= {
            name: Companion(name, path=self._folder.file(name)) for name in self._folder.names() if name in _COMPANIONS
        }
        return [found[name] for name in sorted(found)]

    def provenance(self) -> dict[str, Any]:
        base, stat = self.base.provenance(), self._file.path.stat()
        version = self._revision or f"{stat.st_size} {stat.st_mtime_ns}"
        seen = hashlib.sha256(self._file.header.raw)
        seen.update(f"{version} {base.get('digest')} {sorted(self._settings.items(), key=str)}".encode())
        found = {"ref": self.ref, "format": "peft", "digest": f"sha256:{seen.hexdigest()}", "base": base}
        return found | ({"revision": self._revision} if self._revision else {})

    def close(self) -> None:
        self._file.close()
        self.base.close()


def _open_base(path: Path, settings: Mapping[str, Any], open_base: OpenBase) -> Checkpoint:
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise BadInput(
            f"{path / CONFIG}: base_model_name_or_path is {base!r}; write the path or Hub id of the base there"
        )
    beside = os.path.join(path, base)
    if not os.path.exists(base) and os.path.exists(beside):  # a relative path, seen from the adapter
        base = beside
    return open_base(base, settings.get("revision"))


def _refuse(settings: Mapping[str, Any], ref: str) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise BadInput(
            f"{ref}: peft_type = {kind!r}; only LORA adapters are merged on the fly; merge it with peft first"
        )
    for key, what in _REFUSED.items():
        if settings.get(key):
            raise BadInput(
                f"{ref}: {key} = {settings[key]!r}: {what} is not merged on the fly; merge it with peft first"
            )
    start = settings.get("init_lora_weights", True)
    if start not in _KEEPS_BASE:
        raise BadInput(
            f"{ref}: init_lora_weights = {start!r} changed the base's weights when training began; merge it with peft first"
        )
    if settings.get("use_dora") and settings.get("fan_in_fan_out"):
        raise BadInput(f"{ref}: use_dora with fan_in_fan_out is not merged on the fly; merge it with peft first")


def _pattern(patterns: Any, module: str, default: Any, ref: str) -> Any:
    """peft's rule: the first pattern that matches a tail of the module's name."""
    if not isinstance(patterns or {}, Mapping):
        raise BadInput(f"{ref}: rank_pattern or alpha_pattern is {patterns!r}, an object is expected")
    for pattern, value in (patterns or {}).items():
        if matches_tail(pattern, module, f"{ref}: rank_pattern or alpha_pattern {pattern!r}"):
            return value
    return default
