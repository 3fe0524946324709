"""The verb `generate`: continue a prompt with any checkpoint that moeforge can read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeforge.errors import BadInput, UsageProblem
from moeforge.options import arg, opt
from moeforge.pipeline.artifact import Artifact
from moeforge.pipeline.context import Context
from moeforge.pipeline.reading import Decoding
from moeforge.pipeline.stage import Answer


@dataclass(frozen=True)
class Options(Decoding):
    prompt: str = arg("what to continue, or to answer")
    max_new_tokens: int = opt("stop after this many tokens", default=64, min=1, short="-n")
    temperature: float = opt("randomness; 0 takes the likeliest token every time", default=0.0, min=0.0)
    top_p: float = opt(
        "sample from the likeliest tokens that hold this much probability", default=1.0, min=0.0, max=1.0
    )
    seed: int = opt("seed of the sampling", default=0, min=0)
    chat: bool | None = opt("put the prompt through the chat template", default=None)
    dtype: str | None = opt("float type to compute in, e.g. bfloat16; unset: the checkpoint's", default=None)
    device: str = opt("where to run: cpu, cuda, cuda:1, mps", default="cpu")

    def __post_init__(self) -> None:
        if self.top_p < 1 and self.temperature == 0:
            raise UsageProblem(f"--top-p {self.top_p} needs --temperature above 0: greedy decoding does not sample")
        if self.top_p == 0:
            raise UsageProblem("--top-p 0 leaves no token to choose from; use --temperature 0 for greedy decoding")


class Generate:
    name = "generate"
    summary = "continue a prompt with any checkpoint, compressed and GGUF included"
    examples = {
        'moeforge generate moe "The with statement is used to" -n 24': "the likeliest continuation",
        'moeforge generate moe "Tell me a story" --temperature 0.8 --top-p 0.95 --seed 1': "sampled, and repeatable",
    }
    api_version = 1
    consumes = frozenset({"checkpoint", "gguf", "adapter"})
    sources = 1
    Options = Options

    def answer(self, sources: list[Artifact], options: Options, ctx: Context) -> Answer:
        import torch
        import transformers

        from moeforge.checkpoint import open_checkpoint
        from moeforge.model.build import require_generation
        from moeforge.model.compute import check_compute
        from moeforge.model.kernels import use_kernels_where_faster
        from moeforge.model.load import load
        from moeforge.model.tokenizer import load_tokenizer

        transformers.logging.set_verbosity_error()
        check_compute(options.device, options.dtype)
        began = time.monotonic()
        with open_checkpoint(
            sources[0].ref, allow_pickle=options.allow_pickle, dequantize=options.dequantize, compressed=True
        ) as checkpoint:
            require_generation(checkpoint.config, checkpoint.ref)
            tokenizer = load_tokenizer(checkpoint)
            inputs = encode(tokenizer, options.prompt, options.chat)
            check_length(len(inputs), options.max_new_tokens, checkpoint.config)
            ctx.say(f"loading {checkpoint.ref}")
            model = load(checkpoint, dtype=options.dtype, device=options.device)
        use_kernels_where_faster(model)
        loaded = time.monotonic()
        ids = torch.tensor([inputs], device=options.device)
        sampling: dict[str, Any] = {"do_sample": False}
        if options.temperature > 0:
            torch.manual_seed(options.seed)
            sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
        with torch.no_grad():
            out = model.generate(  # pyright: ignore[reportCallIssue] - a mixin method, not a submodule
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0, stopping_criteria=[_Stop(ctx)], **sampling,
            )  # fmt: skip
        new = out[0, ids.shape[1] :].tolist()
        text = str(tokenizer.decode(new, skip_special_tokens=True))
        seconds = time.monotonic() - loaded
        ctx.say(f"{len(new)} tokens in {seconds:.1f} s, {len(new) / seconds:.1f} tokens/s")
        data = {
            "text": text, "prompt": options.prompt, "prompt_tokens": len(inputs), "new_tokens": len(new),
            "tokens_per_second": len(new) / seconds, "load_seconds": loaded - began, "seconds": seconds,
        }  # fmt: skip
        return Answer(data, text)


class _Stop:
    """Lets Ctrl-C and a vanished reader end the generation between two tokens."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx

    def __call__(self, ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        self.ctx.check()
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


def encode(tokenizer: Any, prompt: str, chat: bool | None) -> list[int]:
    """Token ids of a prompt.

    Args:
        chat: None uses the chat template where there is one.

    Raises:
        UsageProblem: a chat was asked for and the tokenizer has no template.
        BadInput: no tokens come out of the prompt.
    """
    template = getattr(tokenizer, "chat_template", None)
    if chat and not template:
        raise UsageProblem("--chat: this tokenizer has no chat template; leave the option out")
    if template and chat is not False:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer.encode(text, add_special_tokens=False)
    else:
        ids = tokenizer.encode(prompt)
    if not ids:
        raise BadInput("the prompt is empty and this tokenizer adds no start token; write something to continue")
    return ids


def check_length(prompt: int, new: int, config: Mapping[str, Any]) -> None:
    """Refuse positions (numbers of tokens) that the model was never trained on; a model without a limit takes any.

    Raises:
        UsageProblem: names both numbers and the limit.
    """
    from moeforge.model.build import parse_config

    # a family may call its limit otherwise (`n_positions`): transformers translates; ours stands in front of another's config
    limit = getattr(parse_config(config.get("base_config", config)).get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or prompt + new <= limit:
        return
    told = f"a prompt of {prompt} tokens and --max-new-tokens {new} pass the model's max_position_embeddings = {limit}"
    raise UsageProblem(f"{told}; use at most -n {limit - prompt}" if prompt < limit else f"{told}; shorten the prompt")
