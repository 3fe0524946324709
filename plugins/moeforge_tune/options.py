"""What the user may choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moeforge.errors import UsageProblem
from moeforge.options import opt


@dataclass(frozen=True)
class Options:
    data: tuple[str, ...] = opt("text to learn from: .txt .md .rst .py .jsonl .parquet, a directory, a dataset of the Hub "
                                "(org/name[@revision][:split]), or builtin:prose, builtin:code, builtin:legal; SOURCE=WEIGHT "
                                "sets its share of the tokens", metavar="SOURCE", reads=True)  # fmt: skip
    train: str = opt(
        "what learns: all, experts, routers, or patterns of parameter names; comma-separated", default="all"
    )
    routing: Literal["config", "label", "all"] = opt(
        "how tokens choose while training: as the routers are made; label: each text's own expert; all: every expert by its score",
        default="config",
    )
    label_field: str | None = opt(
        "what a .jsonl or .parquet record calls its label, a number or an expert's name [default: the number of its --data source]",
        default=None,
    )
    steps: int | None = opt("stop after this many updates [default: 200]", default=None, min=1)
    tokens: int | None = opt("stop after this many predicted tokens", default=None, min=1)
    minutes: float | None = opt("stop after this much training time", default=None, min=0.01)
    sequence_length: int = opt("slots in a row of packed documents", default=1024, min=8, unit="tokens")
    batch_size: int = opt("rows in one forward pass", default=4, min=1)
    accumulate: int = opt("forward passes before each update", default=1, min=1)
    optimizer: Literal["adamw", "adamw-8bit"] = opt(
        "AdamW, or bitsandbytes' with moments of 8 bits: a quarter of the optimizer's memory", default="adamw"
    )
    learning_rate: float = opt("peak learning rate of AdamW", default=5e-5, min=0)
    router_scale: float = opt("routers learn at this multiple of the learning rate", default=1.0, min=0)
    lora_plus: float = opt(
        "the B of LoRA experts learns at this multiple of the learning rate (LoRA+)", default=1.0, min=0
    )
    schedule: Literal["cosine", "constant", "wsd"] = opt(
        "learning rate after the warm-up: cosine to a tenth, constant, or constant then linear to 0 in the last fifth",
        default="cosine",
    )
    warmup: float = opt("share of the budget in which the learning rate rises", default=0.05, min=0, max=1)
    weight_decay: float = opt("decoupled weight decay; norms, biases and routers left out", default=0.1, min=0)
    clip: float = opt("largest gradient norm; 0 does not clip", default=1.0, min=0)
    balance: float = opt("weight of each layer's load-balance loss (1 when even)", default=0.01, min=0)
    z_loss: float = opt("weight of each layer's router z-loss", default=0.0, min=0)
    entropy: float = opt("weight of each layer's router entropy, in nats a token", default=0.0, min=0)
    entropy_sign: Literal["plus", "minus"] = opt(
        "plus adds the entropy: routers grow sure; minus subtracts it: they stay undecided (LoRA-Mixer, as printed)",
        default="plus",
    )
    importance: float = opt(
        "weight of each layer's importance loss (0 when experts weigh the same in total)", default=0.0, min=0
    )
    preserve: float = opt(
        "weight of the experts' squared distance from where they start (LoRA-Mixer)", default=0.0, min=0
    )
    teacher: str | None = opt(
        "checkpoint with the same tokenizer to learn from as well, such as the dense parent or the mixture before it was compressed: "
        "distillation, loss = (1 - kd) * cross entropy + kd * T^2 * KL(teacher || student) at temperature T (arXiv:1503.02531)",
        default=None,
        metavar="REF",
        reads=True,
    )
    kd: float | None = opt(
        "weight of the distance from --teacher; 1 leaves the text's own tokens without a say [default: 0.9 with --teacher]",
        default=None,
        min=0,
        max=1,
    )
    kd_temperature: float = opt(
        "temperature T of both distributions; above 1 what the teacher thinks unlikely counts more",
        default=1.0,
        min=0.01,
    )
    precision: Literal["auto", "fp32", "bf16"] = opt(
        "what the model computes in; sums are always float32; auto is bf16 on an accelerator, fp32 on a CPU",
        default="auto",
    )
    gradient_checkpointing: bool = opt(
        "keep no activations, compute them again: less memory, a third more time", default=False
    )
    held_out: float = opt("share of the documents kept for measuring; 0 measures nothing", default=0.02, min=0, max=0.9)
    evaluate_every: int = opt(
        "measure the held-out loss every so many updates as well; 0: before and after", default=0, min=0
    )
    routing_every: int = opt(
        "write load, entropy and idle experts of every layer into metrics.jsonl every so many updates; 0: with the held-out loss only",
        default=0,
        min=0,
    )
    save_every: int = opt(
        "save the state for a resume every so many updates as well; 0: on Ctrl-C and at the end", default=0, min=0
    )
    tp: int = opt(
        "ranks that cut every matrix among them (tensor parallel); needs torchrun or accelerate launch, as the next three do",
        default=1,
        min=1,
        affects_output=False,
    )
    fsdp: int = opt(
        "ranks among which parameters, gradients and moments lie in shards (FSDP2)",
        default=1,
        min=1,
        affects_output=False,
    )
    ep: int = opt(
        "ranks that own different experts (expert parallel): a multiple of --tp that divides fsdp * tp",
        default=1,
        min=1,
        affects_output=False,
    )
    dp_replicate: int | None = opt(
        "copies of all that, on rows of their own [default: what the ranks leave]",
        default=None,
        min=1,
        affects_output=False,
    )
    seed: int = opt("order of the documents and which are held out", default=0, min=0)

    def __post_init__(self) -> None:
        if not self.data:
            raise UsageProblem("tune needs text: --data PATH, or --data builtin:prose")
        given = [name for name in ("steps", "tokens", "minutes") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageProblem(f"--{given[0]} and --{given[1]} are two budgets; give one")
        if self.teacher is None:
            lost = f"--kd {self.kd:g}" if self.kd is not None else f"--kd-temperature {self.kd_temperature:g}"
            if self.kd is not None or self.kd_temperature != 1:
                raise UsageProblem(f"{lost} has no effect without a teacher; give --teacher REF, or leave it out")
        elif self.kd == 0:
            raise UsageProblem(
                f"--kd 0 gives --teacher {self.teacher} no weight; give more, up to 1, or leave --teacher out"
            )

    @property
    def budget(self) -> tuple[Literal["steps", "tokens", "minutes"], float]:
        for name in ("tokens", "minutes"):
            if (amount := getattr(self, name)) is not None:
                return name, amount
        return "steps", self.steps or 200

    @property
    def kd_weight(self) -> float:
        """Hinton et al. found the text's own tokens to help most with a considerably lower weight than the teacher."""
        return 0.0 if self.teacher is None else 0.9 if self.kd is None else self.kd

    @property
    def moment_bytes(self) -> int:
        """Of both moments of one parameter."""
        return 2 if self.optimizer == "adamw-8bit" else 8

    @property
    def tokens_a_pass(self) -> int:
        """Of one rank."""
        return self.sequence_length * self.batch_size
