"""What the user may choose; every form reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moeforge.errors import UsageProblem
from moeforge.options import Bytes, opt
from moeforge.pipeline.reading import Reading


@dataclass(frozen=True)
class Options(Reading):
    to: Literal["hf", "gguf", "mixlora", "moe-peft", "mola", "peft", "peft-experts"] = opt(
        "hf: a plain Hugging Face directory; gguf: a file for llama.cpp; of an adapter of LoRA experts: mixlora, moe-peft, mola: what those "
        "programs read; peft: one LoRA, where that is exact; peft-experts: a LoRA for each expert"
    )
    type: Literal["auto", "f32", "f16", "bf16", "q8_0"] = opt(
        "number format of the weights; auto keeps the source's", default="auto"
    )
    max_shard_size: Bytes = opt("largest safetensors file", default=Bytes(5_000_000_000), unit="bytes")
    dequantize: bool = opt("accept a source that is quantised or compressed, and decode it first", default=False)

    def __post_init__(self) -> None:
        if self.to not in ("hf", "gguf") and self.type not in ("auto", "f32"):
            raise UsageProblem(
                f"--type {self.type}: an adapter for --to {self.to} is written in f32, as its program does"
            )
        if self.to == "hf" and self.type == "q8_0":
            raise UsageProblem(
                "--type q8_0 is a GGUF format; with --to hf choose auto, f32, f16 or bf16, or run compress"
            )
