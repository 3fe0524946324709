"""LoRA experts as whole networks: a plain loop in float64 over dense modules of transformers, with routing written out once more.

What an adapter computes is compared with it: logits, and the gradient of every tensor. Nothing of moeforge.mixture or of the kernels is
used here, and no algebra: expert e has the matrix W + s_e B_e A_e, and y = f(x) + sum_e g_e (f_e(x) - f(x)).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ..mixture.config import MixtureConfig, RouterConfig
from .adapters import lora, lora_ffn

PREFIX = "base_model.model."
TOKENS = (2, 40)
ATTENTION = {"q": ("q_proj",), "k": ("k_proj",), "v": ("v_proj",), "qkv": ("qkv_proj", "query_key_value", "c_attn"),
             "o": ("o_proj", "dense", "c_proj")}  # fmt: skip
FFN = {"gate": ("gate_proj",), "up": ("up_proj", "dense_h_to_4h", "c_fc"), "gate_up": ("gate_up_proj",),
       "down": ("down_proj", "dense_4h_to_h", "c_proj")}  # fmt: skip


def presets(layers: nn.ModuleList) -> dict[str, list[MixtureConfig]]:
    """The four published mixtures, small, for a model of three layers."""
    depth = range(len(layers))
    attention = [role for role in ATTENTION if find(layers[0], role) is not None]
    roles = [*attention, *(role for role in FFN if find(layers[0], role) is not None)]
    plain = [lora(role, 1, depth) for role in attention]
    straight = RouterConfig(top_k=1, renormalise=False, gate_scale="straight_through")
    soft = RouterConfig(top_k=3, train_select="all")
    return {
        "mixlora": [lora_ffn(8, depth), *plain],
        "mola": [lora(role, 2 * (i + 1), (i,)) for role in roles for i in depth],
        "llava-mole": [lora_ffn(3, depth, straight), *plain],
        "lora-mixer": [lora(role, 6, depth, soft) for role in attention],
    }


def find(layer: nn.Module, role: str) -> str | None:
    """The path of a role's linear map in a layer."""
    for path, _ in layer.named_modules():
        holder, _, leaf = path.rpartition(".")
        inside = "attn" in holder or "attention" in holder
        if leaf in (ATTENTION if inside else FFN).get(role, ()):
            return path
    return None


@dataclass(frozen=True)
class Whole:
    """The dense model whose modules loop over experts, and the adapter's tensors that they read, by name on disk."""

    model: Any
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, adapter: Path, dtype: torch.dtype) -> Whole:
        from transformers import AutoModelForCausalLM

        settings = json.loads((adapter / "adapter_config.json").read_text())
        base = settings["base_model_name_or_path"]
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).requires_grad_(False)
        stored = load_file(adapter / "adapter_model.safetensors")
        tensors = {name.removeprefix(PREFIX): value.to(dtype).requires_grad_() for name, value in stored.items()}
        path, layers = layers_of(model)
        for entry in settings["mixtures"]:
            for i in entry["layers"]:
                _replace(layers[i], f"{path}.{i}", entry, tensors)
        return cls(model, tensors)


def layers_of(model: Any) -> tuple[str, nn.ModuleList]:
    return next((path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList))


def _replace(layer: nn.Module, path: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Give the module at an entry's site a forward that loops over its experts."""
    count, options = entry["experts"]["count"], entry["experts"]["options"]
    scale = options["alpha"] / options["rank"]
    roles = tuple(FFN) if entry["site"] == "ffn" else (entry["site"],)
    maps = {role: found for role in roles if (found := find(layer, role)) is not None}
    root = maps["down"].rpartition(".")[0] if entry["site"] == "ffn" else maps[entry["site"]]
    site = layer.get_submodule(root)

    def through(role: str, x: Tensor, e: int | None) -> Tensor:
        module: Any = layer.get_submodule(maps[role])
        weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
        if e is not None:
            at = f"{path}.{root}" + (f".experts.{e}" if count > 1 else "") + maps[role][len(root) :]
            weight = weight + scale * tensors[f"{at}.lora_B.weight"] @ tensors[f"{at}.lora_A.weight"]
        return F.linear(x, weight, module.bias)

    def network(x: Tensor, e: int | None) -> Tensor:
        if entry["site"] != "ffn":
            return through(entry["site"], x, e)
        act = next(getattr(site, name) for name in ("act_fn", "activation_fn", "act") if hasattr(site, name))
        if "gate_up" in maps:
            gate, up = through("gate_up", x, e).chunk(2, -1)
            return through("down", act(gate) * up, e)
        inner = act(through("gate", x, e)) * through("up", x, e) if "gate" in maps else act(through("up", x, e))
        return through("down", inner, e)

    def forward(self: nn.Module, hidden: Tensor) -> Tensor:
        if count == 1:
            return network(hidden, 0)
        gates = _gates(hidden @ tensors[f"{path}.{root}.router.weight"].T, entry["router"], layer.training)
        plain = network(hidden, None)
        return plain + sum(gates[..., e, None] * (network(hidden, e) - plain) for e in range(count))

    site.forward = MethodType(forward, site)  # pyright: ignore[reportAttributeAccessIssue]


def _gates(logits: Tensor, router: Mapping[str, Any], training: bool) -> Tensor:
    """[..., E] -> weights, zero for experts that are not chosen."""
    probabilities = logits.softmax(-1)
    if ((training and router["train_select"]) or router["select"]) == "all":
        return probabilities
    best = probabilities.topk(router["top_k"], -1).indices
    chosen = torch.zeros_like(probabilities).scatter(-1, best, 1.0)
    gates = chosen * probabilities
    if router["renormalise"]:
        gates = gates / gates.sum(-1, keepdim=True)
    if router["gate_scale"] == "straight_through":
        gates = chosen * (1 + gates - gates.detach())
    return gates


@dataclass(frozen=True)
class Answer:
    """Logits [tokens, V] of the tokens that are no padding, and the gradient of every tensor by name; `input`: of the embeddings."""

    logits: Tensor
    gradients: dict[str, Tensor]

    def errors(self, found: Answer) -> dict[str, float]:
        """Relative to this one: of the logits, and of each gradient, in the norm of the whole tensor."""
        pairs = {"logits": (found.logits, self.logits)} | {
            name: (found.gradients[name], value) for name, value in self.gradients.items()
        }
        return {name: _relative(a.double(), b) for name, (a, b) in pairs.items()}


def _relative(found: Tensor, wanted: Tensor) -> float:
    if not wanted.any():  # an expert that no token visits
        return float("inf") if found.any() else 0.0
    return float((found - wanted).norm() / wanted.norm())


def ask(model: Any, gradients: Callable[[], Mapping[str, Tensor]], *, training: bool, seed: int = 0) -> Answer:
    """What a model answers to two sequences, the second of which ends in padding, and what its tensors are told about a random loss.

    Args:
        gradients: name on disk -> gradient, called after the way back.
    """
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    generator = torch.Generator().manual_seed(seed)
    embeddings = model.get_input_embeddings()
    ids = torch.randint(3, 190, TOKENS, generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -5:] = 0
    inputs = embeddings(ids).detach().requires_grad_()
    logits = model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits[mask.bool()]
    upstream = torch.randn(logits.shape, generator=generator)
    (logits * upstream).sum().backward()
    assert inputs.grad is not None
    return Answer(logits.detach(), {"input": inputs.grad, **gradients()})


def ask_whole(adapter: Path, *, training: bool, seed: int = 0, dtype: str = "float64") -> Answer:
    """The same of the loop over whole networks."""
    whole = Whole.of(adapter, getattr(torch, dtype))

    def gradients() -> dict[str, Tensor]:
        return {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in whole.tensors.items()}

    return ask(whole.model, gradients, training=training, seed=seed)


def ask_mixture(adapter: Path, backends: Mapping[str, str], *, training: bool, seed: int = 0) -> Answer:
    """The same of moeforge's own model in float32, its ops on the back ends given.

    Raises:
        ValueError: a back end cannot run here.
    """
    from ..model.layout import own_tensors
    from ..model.load import load

    model: Any = load(str(adapter), dtype="float32")

    def gradients() -> dict[str, Tensor]:
        held = dict(model.named_parameters())
        return {name: part for item in own_tensors(model)
                for name, part in item.split(_gradient(held[item.parameter])).items()}  # fmt: skip

    with pinned(backends):
        return ask(model, gradients, training=training, seed=seed)


@torch.no_grad()
def decode(adapter: Path, *, seed: int = 0) -> Tensor:
    """The logits [T, V] of the first of the sequences of :func:`ask` in moeforge's own model in float32, in use: token after token, with
    a cache and without gradients, which is what the ops' ways of a decoding step are for."""
    from ..model.load import load

    model: Any = load(str(adapter), dtype="float32")
    ids = torch.randint(3, 190, TOKENS, generator=torch.Generator().manual_seed(seed))[:1]
    found, cache = [], None
    for token in ids.split(1, 1):
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits[0, 0])
    return torch.stack(found)


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


BACKENDS: dict[str, dict[str, str]] = {
    "default": {},
    "reference": {
        "lora_experts": "reference",
        "lora_shrink": "reference",
        "lora_expand": "reference",
        "lora_ffn": "reference",
        "lora_network": "reference",
    },
    "concat, blocked": {
        "lora_experts": "concat",
        "lora_shrink": "concat",
        "lora_expand": "concat",
        "lora_ffn": "blocked",
    },
    "grouped": {"lora_experts": "grouped", "lora_shrink": "grouped", "lora_expand": "grouped", "lora_ffn": "grouped"},
    "few": {"lora_experts": "few", "lora_expand": "few"},
    "cpu": {"lora_ffn": "cpu"},
}
"""What the ops of LoRA experts run on, by op; an op that is not named chooses by itself."""


@contextlib.contextmanager
def pinned(backends: Mapping[str, str]) -> Iterator[None]:
    """Within the block ops run on these back ends, each by its name; :func:`moeforge_kernels.dispatch.using` is one name for all."""
    from moeforge_kernels import lora_experts, lora_ffn, lora_network

    ops = {
        op.name: op for op in (lora_experts.OP, lora_experts.SHRINK, lora_experts.EXPAND, lora_ffn.OP, lora_network.OP)
    }
    with contextlib.ExitStack() as stack:
        for name, backend in backends.items():
            op = ops[name]

            def choose(asked: str | None, *args: Any, op: Any = op, backend: str = backend, **kwargs: Any) -> Any:
                return type(op).choose(op, backend, *args, **kwargs)

            op.choose = choose  # pyright: ignore[reportAttributeAccessIssue]
            stack.callback(op.__dict__.pop, "choose")
        yield


def worst(errors: Mapping[str, float], names: Sequence[str] | None = None) -> tuple[str, float]:
    """The largest error, nan above all, and whose it is."""
    return max(((name, errors[name]) for name in names or errors), key=lambda item: (item[1] != item[1], item[1]))
