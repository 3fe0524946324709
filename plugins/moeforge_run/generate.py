"""The verb `generate`: continue a prompt with any checkpoint that moeforge can read."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeforge.errors import BadInput, UsageProblem
from moeforge.options import arg, opt
from moeforge.pipeline.artifact import Artifact
from moeforge.pipeline.context import Context
from moeforge.pipeline.reading import Decoding
from moeforge.pipeline.stage import Answer

from .requests import Request, adapters_of, is_file, requests_of


@dataclass(frozen=True)
class Options(Decoding):
    prompt: str = arg("what to continue, or to answer; or @FILE.jsonl, an object a line: a prompt and its adapter")
    adapter: tuple[str, ...] = opt("an adapter of LoRA experts beside SRC, its base, by a name for it; several answer in one batch: the "
                                   "prompt once each, or the lines of a file by theirs", default=(), metavar="NAME=REF")  # fmt: skip
    batch: int = opt("prompts that run at once", default=16, min=1)
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
        'moeforge generate base "Theorem 1." --adapter math=m --adapter law=l': "what each of two adapters makes of it, in one batch",
    }
    api_version = 1
    consumes = frozenset({"checkpoint", "gguf", "adapter"})
    sources = 1
    Options = Options

    def answer(self, sources: list[Artifact], options: Options, ctx: Context) -> Answer:
        import torch
        import transformers

        from moeforge.model.compute import check_compute
        from moeforge.model.kernels import use_kernels_where_faster

        transformers.logging.set_verbosity_error()
        check_compute(options.device, options.dtype)
        refs = adapters_of(options.adapter)
        requests = requests_of(options.prompt, list(refs))
        began = time.monotonic()
        model, tokenizer, prompts = _load(sources[0].ref, refs, requests, options, ctx)
        use_kernels_where_faster(model)
        loaded = time.monotonic()
        if options.temperature > 0:
            torch.manual_seed(options.seed)
        new: list[list[int]] = []
        for start in range(0, len(requests), options.batch):
            rows = slice(start, start + options.batch)
            new += _continue(model, tokenizer, prompts[rows], requests[rows], options, ctx)
        texts = [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in new]
        seconds, total = time.monotonic() - loaded, sum(map(len, new))
        ctx.say(f"{total} tokens in {seconds:.1f} s, {total / seconds:.1f} tokens/s")
        answers = [
            {"text": text, "prompt": asked.prompt, "prompt_tokens": len(ids), "new_tokens": len(tokens)}
            for text, asked, ids, tokens in zip(texts, requests, prompts, new, strict=True)
        ]
        speed = {"tokens_per_second": total / seconds, "load_seconds": loaded - began, "seconds": seconds}
        if not refs and not is_file(options.prompt):
            return Answer(answers[0] | speed, texts[0])
        named = [{"adapter": asked.adapter, **answer} for asked, answer in zip(requests, answers, strict=True)]
        shown = "\n".join(f"{asked.adapter or 'base'}: {text}" for asked, text in zip(requests, texts, strict=True))
        return Answer({"answers": named, "new_tokens": total, **speed}, shown)


def _load(
    ref: str, refs: Mapping[str, str], requests: Sequence[Request], options: Options, ctx: Context
) -> tuple[Any, Any, list[list[int]]]:
    """(model, tokenizer, token ids of every prompt). What does not fit is refused before weights are read."""
    from moeforge.checkpoint import open_checkpoint
    from moeforge.checkpoint.expert_adapter import ExpertAdapter
    from moeforge.model.build import require_generation
    from moeforge.model.joining import join
    from moeforge.model.load import load
    from moeforge.model.tokenizer import load_tokenizer

    reading: Any = {"allow_pickle": options.allow_pickle, "dequantize": options.dequantize, "compressed": True}
    with contextlib.ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(ref, **reading))
        require_generation(checkpoint.config, checkpoint.ref)
        if refs and isinstance(checkpoint, ExpertAdapter):
            raise UsageProblem(
                f"--adapter stands beside a base, and {ref} is an adapter; give {checkpoint.base.ref} as SRC and --adapter NAME={ref}"
            )
        adapters: dict[str, ExpertAdapter] = {}
        for name, place in refs.items():
            opened = stack.enter_context(open_checkpoint(place, **reading))
            if not isinstance(opened, ExpertAdapter):
                raise BadInput(
                    f"--adapter {name}={place}: not an adapter of LoRA experts; moeforge attach and tune write those, "
                    "attach --method import reads others"
                )
            adapters[name] = opened
        tokenizer = load_tokenizer(checkpoint)
        prompts = [encode(tokenizer, request.prompt, options.chat) for request in requests]
        check_length(max(map(len, prompts)), options.max_new_tokens, checkpoint.config)
        ctx.say(f"loading {checkpoint.ref}" + (f" and {len(adapters)} adapters" if adapters else ""))
        how: Any = {"dtype": options.dtype, "device": options.device}
        return (join(checkpoint, adapters, **how) if adapters else load(checkpoint, **how)), tokenizer, prompts


def _continue(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    requests: Sequence[Request],
    options: Options,
    ctx: Context,
) -> list[list[int]]:
    """The new tokens of every prompt of one batch, up to the end of its text."""
    import torch

    from moeforge.model.joining import labels_of
    from moeforge.model.mixing import LABELS

    pad, width = tokenizer.pad_token_id or tokenizer.eos_token_id or 0, max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=options.device)
    lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=options.device)
    given: dict[str, Any] = {"attention_mask": (torch.arange(width, device=ids.device) >= width - lengths).long()}
    if options.adapter:
        given[LABELS] = labels_of(model, [request.adapter for request in requests])
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    with torch.no_grad():
        out = model.generate(
            ids,
            max_new_tokens=options.max_new_tokens,
            pad_token_id=pad,
            stopping_criteria=[_Stop(ctx)],
            **given,
            **sampling,
        )
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    new = []
    for row in out[:, width:].tolist():
        end = next((place for place, token in enumerate(row, 1) if token in ends), len(row))
        new.append(row[:end])  # behind its end a row is padded as long as others go on
    return new


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
