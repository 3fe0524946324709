"""The one door through which every source of weights is opened."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BadInput
from .base import COMPRESSION, Checkpoint

_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<file>[^@\s]+\.gguf))?(@(?P<pinned>[^@\s]+))?", re.ASCII)


def open_checkpoint(
    ref: str | os.PathLike[str],
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    dequantize: bool | None = False,
    compressed: bool = False,
    plan: Mapping[str, Any] | None = None,
    adapters: tuple[str, ...] = (),
) -> Checkpoint:
    """Open a checkpoint; only headers are read.

    Args:
        ref: a directory in Hugging Face layout, a PEFT adapter directory (merged on the fly into its base), a GGUF file
            or a directory that holds one and no config.json, a Hub id `org/name[@revision]`, or a GGUF file on the Hub,
            `org/name/file.gguf[@revision]`. An existing path wins over a Hub id.
        revision: branch, tag or commit of a Hub id.
        allow_pickle: read `pytorch_model*.bin`, tensors only.
        dequantize: show a quantised source (GPTQ, AWQ, FP8, bitsandbytes, `moeforge compress`) as plain weights; False
            refuses one; None shows tensors as they are stored.
        compressed: do not refuse what `moeforge compress` wrote but show it as it is stored: for callers that run it so.
        plan: the plan of a dry run that wrote nothing (`Artifact.plan`); `ref` then only names it.
        adapters: directories of the adapters whose base this is, so that none of them is its own.

    Raises:
        BadInput: there is no such checkpoint, or it is damaged, hostile, pickled or quantised.
        MachineLacks: the Hub cannot be reached, or the disk is full.
    """
    if plan is not None:
        from .planned import PlannedCheckpoint

        opened: Checkpoint = PlannedCheckpoint(plan, str(ref))
    else:
        opened = _open_stored(str(ref), revision, allow_pickle, dequantize, adapters)
    stored_as_is = dequantize is None or (compressed and not dequantize and COMPRESSION in opened.config)
    if stored_as_is or not {"quantization_config", COMPRESSION} & opened.config.keys():
        return opened
    from .quantized import wrap

    try:
        return wrap(opened, dequantize)
    except BaseException:
        opened.close()
        raise


def _open_stored(
    ref: str, revision: str | None, allow_pickle: bool, dequantize: bool | None, adapters: tuple[str, ...]
) -> Checkpoint:
    # of os.path, as an adapter names its base as it likes: these take a name of any length and of no user
    path = Path(os.path.expanduser(ref))
    if os.path.isfile(path):
        if _is_gguf(path):
            from .gguf import GGUFCheckpoint

            return GGUFCheckpoint(path, ref=ref)
        if path.name == "moeforge.json":
            path = path.parent
        else:
            raise BadInput(f"{ref}: a file that is not GGUF; name the directory that holds config.json and the weights")

    def open_adapter(directory: Path, ref: str, revision: str | None = None) -> Checkpoint:
        from .adapter import MergedAdapter
        from .expert_adapter import ExpertAdapter, holds_experts

        itself = os.path.realpath(directory)
        if itself in adapters:
            raise BadInput(
                f"{ref}: this adapter is its own base, by way of {adapters[-1]}; name the model's checkpoint"
            )
        experts = holds_experts(directory, ref)

        def open_base(base: str, revision: str | None = None) -> Checkpoint:
            # LoRA experts stand beside linear maps as they are, packed ones too
            return open_checkpoint(base, revision=revision, allow_pickle=allow_pickle, dequantize=dequantize, compressed=experts,
                                   adapters=(*adapters, itself))  # fmt: skip

        made = ExpertAdapter if experts else MergedAdapter
        return made(directory, open_base=open_base, ref=ref, revision=revision)

    if os.path.isdir(path):
        from .directory import open_directory
        from .folder import Folder
        from .index import lone_gguf

        if not (path / "config.json").is_file():
            if (path / "adapter_config.json").is_file():
                return open_adapter(path, ref)
            folder = Folder(path, ref)
            if (exported := lone_gguf(folder.names())) is not None:
                return _open_stored(str(folder.file(exported)), revision, allow_pickle, dequantize, adapters)
        return open_directory(path, ref=ref, allow_pickle=allow_pickle)
    named = _HUB_ID.fullmatch(ref)
    if named is None:
        raise BadInput(f"{ref}: no such file or directory, and not a Hub id (org/name, org/name/file.gguf)")
    from .hub import open_hub

    return open_hub(
        named["name"],
        named["pinned"] or revision,
        file=named["file"],
        allow_pickle=allow_pickle,
        open_adapter=open_adapter,
    )


def _is_gguf(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
