"""Kinds of experts by name: ours, and those that a package registers under the entry-point group `moeforge.mixtures`.

Entry points are looked up by moeforge.model, which knows the registry; here are only the names that moeforge itself provides.
"""

from __future__ import annotations

KINDS = {
    "ffn": "moeforge.mixture.experts.ffn:FFNExperts",
    "lora": "moeforge.mixture.experts.lora:LoraExperts",
    "lora_ffn": "moeforge.mixture.experts.lora_ffn:LoraFFNExperts",
}
"""ExpertsConfig.type -> "module:class"."""
