"""What a checkpoint becomes in GGUF: which tensors, in which encoding, and which metadata. Reads headers only.

The names come from the table that the GGUF reader uses (`moeforge/checkpoint/gguf_families.json`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind

from moeforge.checkpoint.base import Checkpoint
from moeforge.checkpoint.gguf_names import Family, Place, families
from moeforge.checkpoint.tensor import FLOATS
from moeforge.errors import BadInput

KINDS = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0}
FILE_TYPES = {Kind.F32: 0, Kind.F16: 1, Kind.Q8_0: 7, Kind.BF16: 32}
"""general.file_type, by the encoding of the matrices."""
TINY = 1e-20
"""Its products stay normal float32 numbers, and their sigmoid is 1/2 to the last bit."""
_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
    "truncate": True,
}
ROPE_TYPES: dict[str, dict[str, Any]] = {"default": {}, "linear": {}, "llama3": {}, "yarn": _YARN}
"""Rope type -> settings that llama.cpp takes at these values only."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the GGUF file.

    Attributes:
        sources: the checkpoint's tensors, stacked along a new first axis when there are several.
        shape: row-major.
        heads: the rows of so many heads are reordered for llama.cpp's rotary pairs; None: rows keep their order.
        never_zero: an all-zero one is written as :data:`TINY` instead.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    kind: Kind
    heads: int | None
    never_zero: bool

    @property
    def nbytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        count = 1
        for length in self.shape:
            count *= length
        return count // block * block_bytes


def family_of(checkpoint: Checkpoint) -> Family:
    """The table's family for this checkpoint, with every setting that llama.cpp hard-codes checked.

    Raises:
        BadInput: moeforge does not write this architecture, or llama.cpp computes something else; names the key and value.
    """
    config, ref = checkpoint.config, checkpoint.ref
    known = {family.model_type: family for family in families()}
    family = known.get(config.get("model_type", ""))
    if family is None:
        raise BadInput(f"{ref}: model_type = {config.get('model_type')!r} is not an architecture that moeforge writes as GGUF (written are "
                       f"{', '.join(known)}); llama.cpp's own converter (convert_hf_to_gguf.py) may, from the output of --to hf")  # fmt: skip
    for key, rule in family.fixed.items():
        found = config.get(key, rule["absent"])
        if (found or False) != (rule["value"] or False):  # None and [] both say no
            raise BadInput(f"{ref}: {key} = {found!r}, but {rule['why']}: the GGUF file would be another function; "
                           "export to hf instead")  # fmt: skip
    rope = rope_of(config)
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        raise BadInput(
            f"{ref}: rope_type = {rope['rope_type']!r} is not written to GGUF; written are {', '.join(ROPE_TYPES)}"
        )
    for key, value in ROPE_TYPES[rope.get("rope_type", "default")].items():
        if rope.get(key, value) != value:
            raise BadInput(
                f"{ref}: rope setting {key} = {rope[key]!r} is not written to GGUF, llama.cpp takes {value!r}"
            )
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise BadInput(f"{ref}: partial_rotary_factor below 1: arch {family.arch!r} rotates whole heads")
    if family.whole_heads and head_dim(config) * config["num_attention_heads"] != config["hidden_size"]:
        raise BadInput(f"{ref}: head_dim = {head_dim(config)}, but arch {family.arch!r} takes hidden_size / num_attention_heads "
                       "for granted")  # fmt: skip
    return family


def head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings in the form of transformers 5, whichever form the config has."""
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)} | (
        config.get("rope_scaling") or {}
    )
    return {"rope_type": rope.get("type", "default"), "rope_theta": config.get("rope_theta", 10000.0)} | rope


def context_length(config: Mapping[str, Any]) -> int:
    """The length up to which llama.cpp, which ignores windows here, computes the same: the window, where there is one."""
    return min(config["max_position_embeddings"], config.get("sliding_window") or config["max_position_embeddings"])


def entries(checkpoint: Checkpoint, family: Family, kind: Kind) -> list[Entry]:
    """The tensors of the GGUF file, in the table's order.

    Raises:
        BadInput: a tensor is missing, is not a float, or has no place in the architecture.
    """
    config, tensors = checkpoint.config, checkpoint.tensors
    left = dict(tensors)
    if config.get("tie_word_embeddings"):
        left.pop("lm_head.weight", None)
    experts = next((family.setting(config, key) for key, name in family.keys.items() if name == "expert_count"), 0)
    found = []
    for name, place in family.places(config["num_hidden_layers"], experts).items():
        sources = place.names
        if name == "output.weight" and sources[0] not in left and not place.optional:
            sources = ("model.embed_tokens.weight",)  # tied, in an architecture that wants its own copy
        missing = [
            source for source in sources if source not in tensors or (source not in left and source == "lm_head.weight")
        ]
        if missing and place.optional:
            continue
        if missing:
            raise BadInput(
                f"{checkpoint.ref}: tensor {missing[0]!r} is missing, which GGUF architecture {family.arch!r} needs"
            )
        for source in sources:
            left.pop(source, None)
        found.append(_entry(checkpoint, name, place, sources, kind))
    if left:
        first = next(iter(left))
        raise BadInput(f"{checkpoint.ref}: tensor {first!r} ({len(left)} such) has no place in GGUF architecture {family.arch!r}; "
                       "without it the file would be another function")  # fmt: skip
    return found


def _entry(checkpoint: Checkpoint, name: str, place: Place, sources: tuple[str, ...], kind: Kind) -> Entry:
    infos = [checkpoint.tensors[source] for source in sources]
    shape = infos[0].shape
    for info in infos:
        if info.dtype not in FLOATS or info.shape != shape:
            raise BadInput(
                f"{checkpoint.ref}: tensor {info.name!r} is {info.dtype} {list(info.shape)}, expected floats {list(shape)}"
            )
    if place.vector:
        shape = shape[1:]
    if place.f32 or len(shape) == 1:
        kind = Kind.F32
    elif shape[-1] % GGML_QUANT_SIZES[kind][0]:
        kind = Kind.F16
    heads = checkpoint.config[place.heads] if place.heads else None
    return Entry(name, sources, (len(sources), *shape) if place.stacked else shape, kind, heads, place.never_zero)


def metadata(checkpoint: Checkpoint, family: Family, kind: Kind) -> dict[str, Any]:
    """GGUF keys of the architecture. Python ints become UINT32, floats FLOAT32."""
    config, rope = checkpoint.config, rope_of(checkpoint.config)
    width = head_dim(config)
    ours: dict[str, Any] = {theirs: family.setting(config, key) for key, theirs in family.keys.items()}
    if ours["attention.head_count_kv"] is None:
        ours["attention.head_count_kv"] = config["num_attention_heads"]
    ours |= {
        "context_length": context_length(config),
        "vocab_size": config["vocab_size"],
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.dimension_count": width,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] in ("linear", "yarn"):
        ours |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        ours["rope.scaling.original_context_length"] = (
            rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        )
    ours["attention.layer_norm_rms_epsilon"] = float(ours["attention.layer_norm_rms_epsilon"])
    ours.pop("attention.sliding_window", None)
    general = {"general.type": "model", "general.file_type": FILE_TYPES[kind], "general.quantization_version": 2}
    return general | {f"{family.arch}.{key}": value for key, value in ours.items() if value is not None}


def holds(kind: Kind, dtype: str) -> bool:
    """Whether every number of a dtype fits `kind` unchanged."""
    return (kind == Kind.F32 and dtype != "F64") or kind.name == dtype


def warnings(checkpoint: Checkpoint, metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """What the user should know of a GGUF file that is otherwise faithful."""
    found, longest = [], checkpoint.config["max_position_embeddings"]
    if context_length(checkpoint.config) < longest:
        found.append(f"context length {longest} becomes {context_length(checkpoint.config)}, the sliding window: llama.cpp attends "
                     "to everything in this architecture, which is the same only within one window")  # fmt: skip
    if metadata.get("tokenizer.ggml.model") == "no_vocab" and checkpoint.provenance()["format"] != "plan":
        found.append("the source has no tokenizer.json: the file works on token ids only")
    return tuple(found)
