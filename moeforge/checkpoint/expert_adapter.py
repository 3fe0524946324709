"""An adapter of LoRA experts, seen as the whole checkpoint that it makes of its base: read without a copy of the base.

The directory holds `adapter_config.json` and `adapter_model.safetensors`; the base is opened where the config says.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import BadInput
from .adapter_layout import CONFIG, FORMAT_VERSION, PEFT_TYPE, PREFIX, WEIGHTS, complaint, experts_of, shapes_of
from .base import COMPRESSION, Checkpoint
from .digest import PREFIX as DIGEST
from .folder import Folder
from .linear_maps import linear_maps
from .ops import TensorOp
from .safetensors import SafetensorsFile, parse_json, read_header
from .tensor import FLOATS, Companion, Extent, TensorInfo

KEYS = frozenset({"peft_type", "format_version", "task_type", "base_model_name_or_path", "revision", "base_model_type", "base_shapes_sha256",
                  "mixtures", "attach", "experts", "license"})  # fmt: skip
"""What adapter_config.json may hold."""
_SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "revision": (lambda value: value is None or isinstance(value, str), "a commit, a branch, or nothing"),
    "attach": (lambda value: isinstance(value, dict), "an object"),
    "experts": (
        lambda value: isinstance(value, list) and all(isinstance(one, dict) for one in value),
        "a list of objects",
    ),
}
"""Of those that are not judged by what they lead to: (whether a value will do, what is expected)."""


STEM, ONE_FILE = "adapter_model", 1 << 62
"""How the writer is told to make `adapter_model.safetensors`, however large."""


class OpenBase(Protocol):
    """How the base checkpoint is opened: by path or Hub id."""

    def __call__(self, base: str, revision: str | None = None) -> Checkpoint: ...


def holds_experts(path: Path, ref: str) -> bool:
    """Whether a directory with adapter_config.json says that it is of this kind."""
    return parse_json(Folder(path, ref).read(CONFIG), f"{ref}: {CONFIG}").get("peft_type") == PEFT_TYPE


def shapes_digest(tensors: Mapping[str, TensorInfo]) -> str:
    """Identity of a base as far as an adapter must fit it: names and shapes of its matrices."""
    table = sorted((name, list(info.shape)) for name, info in tensors.items() if len(info.shape) > 1)
    return DIGEST + hashlib.sha256(json.dumps(table).encode()).hexdigest()


def view_config(base: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """config.json of the whole: type `moeforge`."""
    named = base.get("architectures") or ["ForCausalLM"]
    head = str(named[0])
    head = "ForCausalLM" if head.endswith("LMHeadModel") or "For" not in head else head[head.index("For") :]
    config = {
        "model_type": "moeforge",
        "architectures": [f"Moeforge{head}"],
        "base_config": dict(base),
        "mixtures": [dict(e) for e in entries],
    }
    dtype = base.get("dtype") or base.get("torch_dtype")
    return config | ({"dtype": dtype} if dtype else {})


class ExpertAdapter(Checkpoint):
    """See the module.

    Attributes:
        base: the open base checkpoint, closed with this one.
        settings: adapter_config.json.
        entries: its `mixtures`.
        own: names of the tensors that are the adapter's; `frozen`: those of imported experts, which do not learn.

    Raises:
        BadInput: not such an adapter, damaged, or one that does not fit the base.
    """

    def __init__(self, path: Path, *, open_base: OpenBase, ref: str | None = None, revision: str | None = None) -> None:
        self.root, self.ref, self._revision = path, ref or str(path), revision
        self._folder = folder = Folder(path, self.ref)
        self.settings = settings = parse_json(folder.read(CONFIG), f"{self.ref}: {CONFIG}")
        self.entries = _entries(settings, self.ref)
        if WEIGHTS not in folder.names():
            raise BadInput(f"{self.ref}: no {WEIGHTS}")
        file, where = folder.file(WEIGHTS), f"{self.ref}: {WEIGHTS}"
        self._file = SafetensorsFile(file, read_header(file, where), where)
        self.base = open_base(_base_of(path, settings, self.ref), settings.get("revision"))
        try:
            self._fit()
        except BaseException:
            self.close()
            raise

    def _fit(self) -> None:
        stored = self._file.header.tensors
        plain = plain_tensors(self.base)
        maps = linear_maps(self.base.config, plain, self.base.ref)
        kind = self.settings.get("base_model_type")
        if kind is not None and self.base.config.get("model_type") != kind:
            raise BadInput(
                f"{self.ref}: made for a base of type {kind!r}, but {self.base.ref} is {self.base.config.get('model_type')!r}"
            )
        # each expert of a layer has a tensor at least: a count that no file could fill is told before its names are made
        least = sum(entry["experts"]["count"] * len(entry["layers"]) for entry in self.entries)
        if least > len(stored):
            raise BadInput(
                f"{self.ref}: {CONFIG} asks for {least} experts, {WEIGHTS} holds {len(stored)} tensors; the adapter is incomplete"
            )
        wanted = shapes_of(self.entries, maps, self.ref)
        for name, shape in wanted.items():
            info = stored.get(PREFIX + name)
            if info is None:
                raise BadInput(f"{self.ref}: {WEIGHTS}: {PREFIX + name} is missing; the adapter is incomplete")
            if info.shape != shape:
                raise BadInput(f"{self.ref}: {PREFIX + name} is {list(info.shape)}, the base {self.base.ref} and {CONFIG} ask for {list(shape)}; "
                               "was it made for another base?")  # fmt: skip
            if info.dtype not in FLOATS:
                raise BadInput(
                    f"{self.ref}: {PREFIX + name} is {info.dtype}: an adapter's weights are floating-point numbers"
                )
        if strangers := sorted(set(stored) - {PREFIX + name for name in wanted}):
            raise BadInput(
                f"{self.ref}: {WEIGHTS} holds {strangers[0]}, which its mixtures do not name; nothing is left out in silence"
            )
        digest = self.settings.get("base_shapes_sha256")
        if digest is not None and digest != shapes_digest(plain):
            raise BadInput(
                f"{self.ref}: made for another base: the shapes of {self.base.ref} have digest {shapes_digest(plain)}, {CONFIG} says {digest}"
            )
        self.own = frozenset(wanted)
        self.frozen = frozenset(name for entry in self.entries if entry["experts"]["options"].get("frozen")
                                for layer in entry["layers"] for name, _ in experts_of(entry, layer, maps, self.ref))  # fmt: skip
        self.config: dict[str, Any] = view_config(self.base.config, self.entries)
        ours = {name: TensorInfo(name, stored[PREFIX + name].dtype, stored[PREFIX + name].shape) for name in wanted}
        self.tensors: Mapping[str, TensorInfo] = {**self.base.tensors, **ours}

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        return self._file.read(PREFIX + name, rows) if name in self.own else self.base.read(name, rows)

    def read_memory(self, name: str, nbytes: int) -> int:
        return nbytes if name in self.own else self.base.read_memory(name, nbytes)

    def extent(self, name: str) -> Extent | None:
        return self._file.extent(PREFIX + name) if name in self.own else self.base.extent(name)

    def companions(self) -> Sequence[Companion]:
        return self.base.companions()

    def provenance(self) -> dict[str, Any]:
        base, stat = self.base.provenance(), self._file.path.stat()
        version = self._revision or f"{stat.st_size} {stat.st_mtime_ns}"
        seen = hashlib.sha256(self._file.header.raw)
        seen.update(f"{version} {base.get('digest')} {json.dumps(self.settings, sort_keys=True)}".encode())
        found = {"ref": self.ref, "format": "lora experts", "digest": f"{DIGEST}{seen.hexdigest()}", "base": base}
        return found | ({"revision": self._revision} if self._revision else {})

    def settings_at(self, directory: Path) -> dict[str, Any]:
        """adapter_config.json of this adapter written elsewhere: a base that it finds beside itself is still the same."""
        root = self._folder.path
        base = _base_of(root, self.settings, self.ref)
        moved = base != self.settings["base_model_name_or_path"] and directory.resolve() != root.resolve()
        return self.settings | ({"base_model_name_or_path": os.path.abspath(base)} if moved else {})

    def close(self) -> None:
        self._file.close()
        self.base.close()


def plain_tensors(base: Checkpoint) -> Mapping[str, TensorInfo]:
    """Headers of the base as they are without its compression: the shapes that an adapter must fit."""
    if COMPRESSION not in base.config and not base.config.get("quantization_config"):
        return base.tensors
    from .quantized import wrap

    return wrap(base, dequantize=True).tensors


def _entries(settings: Mapping[str, Any], ref: str) -> list[dict[str, Any]]:
    where = f"{ref}: {CONFIG}"
    if settings.get("peft_type") != PEFT_TYPE:
        raise BadInput(f"{where}: peft_type = {settings.get('peft_type')!r}: expected {PEFT_TYPE!r}")
    if settings.get("format_version") != FORMAT_VERSION:
        raise BadInput(
            f"{where}: format_version = {settings.get('format_version')!r}; this moeforge reads {FORMAT_VERSION}"
        )
    if unknown := sorted(set(settings) - KEYS):
        raise BadInput(f"{where}: unknown key {unknown[0]!r}; a newer moeforge may have written it")
    for key, (good, expected) in _SETTINGS.items():
        if key in settings and not good(settings[key]):
            raise BadInput(f"{where}: {key} = {settings[key]!r}: expected {expected}")
    entries = settings.get("mixtures")
    if not isinstance(entries, list) or not entries:
        raise BadInput(f"{where}: mixtures = {entries!r}: expected a list of entries")
    for number, entry in enumerate(entries):
        if (wrong := complaint(entry)) is not None:
            raise BadInput(f"{where}: mixtures[{number}]{wrong}")
    return entries


def _base_of(path: Path, settings: Mapping[str, Any], ref: str) -> str:
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise BadInput(
            f"{ref}: {CONFIG}: base_model_name_or_path is {base!r}; write the path or Hub id of the base there"
        )
    beside = os.path.join(path, base)
    return beside if not os.path.exists(base) and os.path.exists(beside) else base


def adapter_ops(values: Mapping[str, tuple[TensorInfo, Callable[[], np.ndarray]]]) -> list[TensorOp]:
    """What writes an adapter's tensors, in the order given: name without the prefix -> (header, its values)."""
    ops = []
    for name, (info, make) in values.items():
        ops.append(TensorOp((TensorInfo(PREFIX + name, info.dtype, info.shape),), compute=make, note="adapter"))
    return ops


def write_settings(directory: Path, settings: Mapping[str, Any]) -> None:
    """adapter_config.json."""
    (directory / CONFIG).write_text(json.dumps(dict(settings), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
