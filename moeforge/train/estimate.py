"""What a run will take, from config and headers alone. No torch."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

from ..checkpoint.architectures import find, ours
from ..checkpoint.roles import role_of
from ..checkpoint.tensor import TensorInfo
from ..errors import UsageProblem

PIECE = 1 << 22
"""Numbers of a distribution, tokens times vocabulary, of which the distance from a teacher is taken at once: 16 MiB of float32, and six such
are held (:func:`moeforge.train.distill.divergence_sum`)."""


def count_selected(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], select: str, *, adapter: bool = False) -> int | None:  # fmt: skip
    """How many parameters `--train select` will train; None where a pattern may be on names that only the loaded model
    has: mixtures fuse their experts in memory, and families that nobody has described, or whose files may leave out a prefix, may
    rename anything.

    Args:
        adapter: `tensors` are those of an adapter of LoRA experts that may learn: what is no router belongs to an expert.

    Raises:
        UsageProblem: experts or routers of a checkpoint that has none, or a pattern that no parameter of a described dense
            family matches.
    """
    experts = {name for name, info in tensors.items() if ("lora_" in name if adapter else role_of(info) == "experts")}
    routers = {name for name, info in tensors.items()
               if role_of(info) == "routers" and len(info.shape) == 2 and info.shape[0] > 1}  # fmt: skip
    groups = {"all": set(tensors), "experts": experts, "routers": routers}
    described = not experts and config.get("model_type") in ours() and not find(config["model_type"]).prefix
    chosen: set[str] = set()
    for part in (part.strip() for part in select.split(",")):
        if part in groups and not groups[part]:
            why = "nothing of the kind learns in this adapter" if adapter else "the checkpoint has no mixture layers"
            raise UsageProblem(f"--train {part}: {why}; {'use' if adapter else 'upcycle it first, or use'} --train all")
        found = groups.get(part) or set(fnmatch.filter(tensors, part))
        if not found:
            # a file may leave out the prefix that a model's own class puts before the names
            if described and not fnmatch.filter((f"model.{name}" for name in tensors), part):
                raise UsageProblem(f"--train {part}: selects no parameter; names look like {next(iter(tensors))}, groups are "
                                   f"{', '.join(groups)}")  # fmt: skip
            return None
        chosen |= found
    return sum(tensors[name].size for name in chosen)


def peak_memory(config: Mapping[str, Any], total: int, trained: int, *, short: bool, tokens: int, rows: int,
                checkpointing: bool, moments: int = 8, shards: int = 1, teacher: int = 0) -> int:  # fmt: skip
    """Bytes at the peak of a training step, of one rank.

    Weights (2 or 4 bytes), a float32 master where they are short, gradient and two AdamW moments of what learns,
    activations of one forward pass (of one layer with checkpointing, plus every layer's input), logits and their
    gradient.

    Args:
        short: bfloat16 compute.
        tokens: in one forward pass, all rows together.
        moments: bytes of the optimizer's state for one parameter that learns.
        shards: ranks among which weights, gradients and moments lie.
        teacher: parameters of the model that is learnt from, which every rank holds whole; 0: there is none. Its logits stay until the
            gradient of the distance is made of them.
    """

    def number(*names: str, default: int) -> int:
        return next((int(config[name]) for name in names if isinstance(config.get(name), int)), default)

    width = number("hidden_size", "n_embd", default=1024)
    layers = number("num_hidden_layers", "n_layer", default=24)
    heads = number("num_attention_heads", "n_head", default=16)
    hidden = number("moe_intermediate_size", "intermediate_size", default=4 * width)
    active = number("num_experts_per_tok", "moe_k", default=1)
    size = 2 if short else 4
    state = (size * total + trained * (4 + moments + (4 if short else 0))) // shards
    # measured on Llama and Mixtral shapes: about 18 vectors of the width and 5 of the FFN a token and active expert
    layer = tokens * (size * (18 * width + 5 * active * hidden) + 2 * size * heads * tokens // rows)
    activations = layer + size * tokens * width * layers if checkpointing else layer * layers
    chances = tokens * number("vocab_size", default=50_000)
    # on the way back, when the loss's own gradient is made, that of the distance is there already
    taught = size * (teacher + chances) + 24 * min(chances, PIECE) if teacher else 0
    return state + activations + chances * (2 * size + 8) + taught
