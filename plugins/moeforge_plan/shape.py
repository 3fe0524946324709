"""The sizes of a model that decide its memory and time, read from a config (and from tensor headers where there are any)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeforge.checkpoint.anatomy import TOP_K, Anatomy, plain_config
from moeforge.checkpoint.architectures import EXPERT_COUNTS, architecture, known
from moeforge.checkpoint.dense_config import MAX_LAYERS
from moeforge.errors import BadInput
from moeforge.pipeline.describe import describe_value

SHARED_COUNTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
SHARED_WIDTHS = ("shared_expert_intermediate_size", "shared_intermediate_size")
EXPERT_WIDTHS = ("moe_intermediate_size", "expert_intermediate_size", "intermediate_size")
SIZE = 10**9
LARGEST = {"num_hidden_layers": MAX_LAYERS, "num_experts": 10**5}
"""Above these a number is a typing error, and what is counted layer by layer would hang on it."""
DENSE_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")


@dataclass(frozen=True)
class Shape:
    """A decoder: L `layers` of width h, of which `sparse_layers` have E `experts` of width f, K of them active a token."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    attention: int
    """Parameters of one layer's attention."""
    dense_width: int
    """FFN width of the layers without experts; 0 where there are none."""
    sparse_layers: int = 0
    experts: int = 0
    top_k: int = 0
    expert_width: int = 0
    shared_width: int = 0
    matrices: int = 3
    """Of an FFN: 3 with a gate, 2 without."""

    @property
    def expert(self) -> int:
        """Parameters of one expert."""
        return self.matrices * self.hidden * self.expert_width

    @property
    def shared(self) -> int:
        """Parameters that every token of a sparse layer visits beside its experts."""
        return self.matrices * self.hidden * self.shared_width

    @property
    def dense_ffn(self) -> int:
        return self.matrices * self.hidden * self.dense_width

    @property
    def parameters(self) -> int:
        ffn = self.sparse_layers * (self.experts * (self.expert + self.hidden) + self.shared)
        return self.layers * self.attention + ffn + self.dense_layers * self.dense_ffn + self.embeddings

    @property
    def active(self) -> int:
        """Parameters that a token is multiplied with: the head, not the embedding."""
        ffn = self.sparse_layers * (self.top_k * self.expert + self.shared + self.experts * self.hidden)
        return self.layers * self.attention + ffn + self.dense_layers * self.dense_ffn + self.vocab * self.hidden

    @property
    def dense_layers(self) -> int:
        return self.layers - self.sparse_layers

    @property
    def embeddings(self) -> int:
        return (1 if self.tied else 2) * self.vocab * self.hidden

    def flops(self, seq: int) -> float:
        """Of one token, forward and backward: 6 x the active parameters, and causal attention over `seq` tokens."""
        return 6.0 * self.active + 3 * self.layers * attention_core(self, seq)

    def describe(self) -> str:
        ffn = f"FFN width {self.dense_width}"
        if self.experts:
            ffn = f"{self.experts} experts of width {self.expert_width}, {self.top_k} active"
            ffn += f", shared width {self.shared_width}" if self.shared_width else ""
            ffn += f"; {self.dense_layers} of the layers dense" if self.dense_layers else ""
        total, active = (describe_value("parameters", count) for count in (self.parameters, self.active))
        return f"{total} parameters, {active} active a token; {self.layers} layers of width {self.hidden}, {ffn}"


def attention_core(shape: Shape, seq: int) -> float:
    """FLOPs of one token's causal attention in one layer, forward: two products over half of `seq` keys."""
    return 2.0 * seq * shape.heads * shape.head_dim


def read(config: Mapping[str, Any], found: Anatomy | None = None) -> Shape:
    """The shape of a model.

    Args:
        config: a parsed `config.json`.
        found: what the tensor headers say, if there are any; it wins over the config on experts and attention.

    Raises:
        BadInput: a size is missing or no positive whole number; names the key.
    """
    settings = plain_config(config)
    matrices = 3
    if settings.get("model_type") in known() and not _count(settings, EXPERT_COUNTS):
        family = architecture({**settings, "mixtures": None})
        if family.kind != "decoder":
            raise BadInput(
                f"config.json: model_type = {family.model_type!r} is no language model that writes; plan knows decoders"
            )
        settings = family.resolve(settings)
        matrices = (
            3 if "gate" in {*family.layer_tensors, *(part for parts in family.fused.values() for part in parts)} else 2
        )
    hidden, layers, heads, vocab = (_size(settings, key) for key in
                                    ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"))  # fmt: skip
    kv_heads = _size(settings, "num_key_value_heads", heads)
    head_dim = _size(settings, "head_dim", max(1, hidden // heads))
    if settings.get("kv_lora_rank") is not None:
        # its queries and keys are wider than its values; the product of both is what attention computes with
        parts = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        head_dim = sum(_size(settings, key) for key in parts) // 2
    attention = _attention(settings, hidden, heads, kv_heads, head_dim)
    if found is not None and found.layers and found.parameters_by_role.get("attention"):
        attention = round(found.parameters_by_role["attention"] / found.layers)
    sparse, experts, top_k, expert_width, shared_width = _mixture(settings, layers, found)
    dense_width = _size(settings, "intermediate_size") if sparse < layers else 0
    return Shape(layers, hidden, heads, kv_heads, head_dim, vocab, bool(settings.get("tie_word_embeddings", False)), attention,
                 dense_width, sparse, experts, top_k, expert_width, shared_width, matrices)  # fmt: skip


def _attention(settings: Mapping[str, Any], hidden: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """Parameters of a layer's attention: four projections, or DeepSeek's with low-rank keys and values."""
    if settings.get("kv_lora_rank") is None:
        return hidden * head_dim * (2 * heads + 2 * kv_heads)
    rank, rope, nope, value = (
        _size(settings, key) for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    )
    query = heads * (rope + nope)
    low = settings.get("q_lora_rank")
    queries = hidden * query if low is None else low * (hidden + query)
    return queries + hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden


def _mixture(settings: Mapping[str, Any], layers: int, found: Anatomy | None) -> tuple[int, int, int, int, int]:
    """(sparse layers, experts, active, width, shared width); zeros for a dense model."""
    if found is not None and found.mixtures:
        first = max(found.mixtures, key=lambda mixture: len(mixture.layers))
        top_k = first.top_k or _count(settings, TOP_K) or first.experts
        width = first.width or _size(settings, EXPERT_WIDTHS[0])
        return sum(len(m.layers) for m in found.mixtures), first.experts, top_k, width, first.shared_width or 0
    if isinstance(settings.get("mixtures"), list):
        raise BadInput("config.json: the sizes of the mixtures of model_type = 'moeforge' stand in the headers of its weights; name the "
                       "directory, not its config.json")  # fmt: skip
    experts = _count(settings, EXPERT_COUNTS)
    if experts < 2:
        return 0, 0, 0, 0, 0
    experts = _size({"num_experts": experts}, "num_experts")
    top_k = _count(settings, TOP_K)
    if not 1 <= top_k <= experts:
        raise BadInput(
            f"config.json: {experts} experts, of which {top_k} are active a token; expected {TOP_K[0]} from 1 to {experts}"
        )
    width = next((settings[key] for key in EXPERT_WIDTHS if settings.get(key)), None)
    width = _size({"moe_intermediate_size": width}, "moe_intermediate_size")
    shared = _count(settings, SHARED_WIDTHS) or _count(settings, SHARED_COUNTS) * width
    return _sparse_layers(settings, layers), experts, top_k, width, shared


def _sparse_layers(settings: Mapping[str, Any], layers: int) -> int:
    """How many layers have experts, by the keys that model families use for it."""
    first = _count(settings, DENSE_FIRST)
    every = max(1, _count(settings, ("decoder_sparse_step", "moe_layer_interval", "interleave_moe_layer_step")))
    listed, only = settings.get("moe_layer_freq"), settings.get("mlp_only_layers")
    if isinstance(listed, list):
        return min(layers, sum(map(bool, listed))) or layers
    dense = only if isinstance(only, list) else []
    return sum(i >= first and (i + 1) % every == 0 and i not in dense for i in range(layers)) or layers


def _count(settings: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    """The number under the first of the keys that is there, or 0.

    Raises:
        BadInput: it is no whole number; taken for 0 it would make a mixture dense.
    """
    key = next((key for key in keys if settings.get(key) is not None), None)
    if key is None:
        return 0
    value = settings[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise BadInput(f"config.json: {key} = {value!r}; plan needs a whole number")
    return value


def _size(settings: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = settings.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadInput(f"config.json: {key} = {value!r}; plan needs a whole number from 1 on")
    if value > LARGEST.get(key, SIZE):
        raise BadInput(f"config.json: {key} = {value}; no model has more than {LARGEST.get(key, SIZE)}")
    return value
