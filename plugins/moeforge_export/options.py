"""What the user may choose; every form reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moeforge.errors import UsageProblem
from moeforge.options import Bytes, opt
from moeforge.pipeline.reading import Reading


@dataclass(frozen=True)
class Options(Reading):
    to: Literal["hf", "gguf", "mixlora", "moe-peft", "mola", "peft", "peft-experts", "moe"] = opt(
        "hf: a plain Hugging Face directory; gguf: a file for llama.cpp; of an adapter of LoRA experts: mixlora, moe-peft, mola: what those "
        "programs read; peft: one LoRA, where that is exact; peft-experts: a LoRA for each expert; moe: says which command makes whole experts"
    )
    merge: bool = opt(
        "with --to hf, of an adapter of LoRA experts: the dense model that it is where its weights do not depend on the token",
        default=False,
    )
    expert: str | None = opt("with --merge: the dense model of one expert, by name or number", default=None)
    approximate_rank: int | None = opt(
        "with --to peft: the LoRA of this rank nearest to the mean of the experts; not the same function",
        default=None,
        min=1,
    )
    type: Literal["auto", "f32", "f16", "bf16", "q8_0"] = opt(
        "number format of the weights; auto keeps the source's", default="auto"
    )
    max_shard_size: Bytes = opt("largest safetensors file", default=Bytes(5_000_000_000), unit="bytes")
    dequantize: bool = opt("accept a source that is quantised or compressed, and decode it first", default=False)

    def __post_init__(self) -> None:
        if self.to == "moe":
            raise UsageProblem(
                "--to moe: whole experts are another model, not another form of this one: moeforge upcycle ADAPTER --method lora"
            )
        if self.merge and self.to != "hf":
            raise UsageProblem(f"--merge writes a dense checkpoint, not --to {self.to}; use --to hf")
        if self.expert is not None and not self.merge:
            raise UsageProblem(
                f"--expert {self.expert} goes with --merge; --to peft-experts writes a LoRA for each expert"
            )
        if self.approximate_rank is not None and self.to != "peft":
            raise UsageProblem(
                f"--approximate-rank {self.approximate_rank} writes a PEFT LoRA, not --to {self.to}; use --to peft"
            )
        if self.to not in ("hf", "gguf") and self.type not in ("auto", "f32"):
            raise UsageProblem(
                f"--type {self.type}: an adapter for --to {self.to} is written in f32, as its program does"
            )
        if self.to == "hf" and self.type == "q8_0":
            raise UsageProblem(
                "--type q8_0 is a GGUF format; with --to hf choose auto, f32, f16 or bf16, or run compress"
            )
