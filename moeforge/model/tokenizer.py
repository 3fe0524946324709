"""The tokenizer that travels with a checkpoint, wherever the checkpoint comes from."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.base import Checkpoint
from ..errors import BadInput, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "spiece", "sentencepiece")


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether tokenizer files travel with the checkpoint."""
    return any(companion.name.startswith(("tokenizer.", "vocab.", "spiece.")) for companion in checkpoint.companions())


def load_tokenizer(ref: str | Checkpoint) -> PreTrainedTokenizerBase:
    """The stock transformers tokenizer of a checkpoint: a directory, a Hub id, a GGUF file (rebuilt from its metadata).

    Args:
        ref: whatever :func:`moeforge.checkpoint.open_checkpoint` takes, or an open checkpoint (left open).

    Raises:
        BadInput: there is none, or transformers cannot load it without code from the checkpoint.
    """
    if not isinstance(ref, Checkpoint):
        from ..checkpoint import open_checkpoint

        with open_checkpoint(str(ref), dequantize=None) as checkpoint:
            return load_tokenizer(checkpoint)
    if not has_tokenizer(ref):
        raise BadInput(f"{ref.ref} has no tokenizer files, so text means nothing to it; copy them beside its weights")
    from transformers import AutoTokenizer

    # the companions are written out, so that a GGUF file, an adapter and a directory all take the same way, and
    # nothing but tokenizer files is seen
    with tempfile.TemporaryDirectory(prefix="moeforge-tokenizer-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(ref.config), "utf-8")
        for companion in ref.companions():
            if companion.name.startswith(_FILES) and "/" not in companion.name and "\\" not in companion.name:
                (Path(folder) / companion.name).write_bytes(companion.read())
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # transformers and tokenizers raise many types here, all about these files
            raise BadInput(f"{ref.ref}: its tokenizer cannot be loaded: {one_line(error)}") from error
    tokenizer.name_or_path = str(ref.ref)
    return tokenizer
