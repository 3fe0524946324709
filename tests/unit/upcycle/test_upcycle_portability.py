"""Where the result runs: verdicts on each runtime, and the rules in `targets/` that give them."""

from moeforge.testing import inprocess
from moeforge_upcycle import pairs, targets


def test_portability_is_told(dense):
    def verdicts(source, norm_topk=True, **config):
        found = inprocess.plan("upcycle", dense(source, **config), norm_topk=norm_topk).verdicts["portability"]
        assert set(found) == {"transformers", "vllm", "llama.cpp"}
        return found

    assert verdicts("llama")["llama.cpp"] == "exact"
    assert verdicts("mistral")["llama.cpp"] == "exact"
    assert verdicts("qwen2")["llama.cpp"].startswith("inexact: ")
    assert "output.weight" in verdicts("qwen2", norm_topk=False, tie_word_embeddings=True)["llama.cpp"]
    assert "sliding_window" in verdicts("mistral", sliding_window=8)["llama.cpp"]
    assert verdicts("olmo2")["llama.cpp"].startswith("unsupported: ")
    assert verdicts("qwen3")["llama.cpp"] == "exact"
    assert verdicts("qwen3", norm_topk=False)["llama.cpp"].startswith("inexact: ")


def test_llama_cpp_is_promised_only_what_export_writes(dense):
    """A layout whose GGUF is not ours to write points to llama.cpp's own converter."""
    from moeforge_export.gguf_model import families

    written = {family.model_type for family in families()}
    for name in targets.known():
        verdict = targets.load(name).portability["llama.cpp"][-1]["verdict"]
        assert (verdict == "exact") is (name in written), name
    silent = inprocess.plan("upcycle", dense("qwen2"), norm_topk=False, router_init="zero")
    assert silent.verdicts["portability"]["llama.cpp"] == "exact"
    counts = inprocess.plan("upcycle", dense("qwen2"), "shared", rank="norm", target="qwen2_moe", norm_topk=False)
    assert "divides 0 by 0" in counts.verdicts["portability"]["llama.cpp"]
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    windowed = inprocess.plan("upcycle", dense("qwen2", **window), norm_topk=False)
    assert "whole context" in windowed.verdicts["portability"]["llama.cpp"]
    glm = inprocess.plan("upcycle", dense("llama"), target="glm4_moe")
    assert glm.verdicts["portability"]["llama.cpp"] == "exact through llama.cpp's own converter, not run here"


RULES = [
    (name, runtime, rule)
    for name in targets.known()
    for runtime, rules in targets.load(name).portability.items()
    for rule in [*targets.load(name).portability_first.get(runtime, ()), *rules]
]


def test_every_portability_rule_speaks_of_settings_that_exist(dense):
    """A rule on a misspelt key would never hold, and the verdict would be too good."""
    for source in ("llama", "qwen2", "qwen3", "olmo2", "granite", "cohere2", "ernie4_5"):
        for pair in pairs.load(source)[0]:
            plan = inprocess.plan("upcycle", dense(source), target=pair.target.model_type)
            settings = {**plan.payload.settings, **plan.config}
            for name, _, rule in RULES:
                if name == pair.target.model_type:
                    for predicate in rule.get("when", ()):
                        assert predicate["key"].split(".")[0] in settings, (name, predicate)
    assert {name for name, _, _ in RULES} == set(targets.known())
