"""The verb: what it takes, what it says, what it refuses."""

import io
import json
import shlex
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from moeforge.errors import BadInput, ExitCode, UsageProblem
from moeforge.options import specs
from moeforge.pipeline.artifact import Artifact

QWEN = {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 4, "num_hidden_layers": 48, "num_experts": 128, "num_local_experts": None,
        "num_experts_per_tok": 8, "vocab_size": 151936}  # fmt: skip


def test_the_published_mapping_is_recommended(ask, write):
    answer = ask(write(), gpus=128)
    row = answer.data["ranked"][0]
    assert {key: row[key] for key in ("engine", "tp", "pp", "etp", "ep")} == {
        "engine": "megatron",
        "tp": 2,
        "pp": 8,
        "etp": 1,
        "ep": 8,
    }
    best = answer.data["best"]["megatron"]
    assert best["rank"] == 1
    assert "model.expert_model_parallel_size=8" in best["overrides"]
    assert "model.virtual_pipeline_model_parallel_size=7" in best["overrides"]
    assert answer.exit_code == ExitCode.OK
    for text in (
        "56 layouts fit into 80 GB",
        "why the others are behind",
        "do not fit, nearest first",
        "GB too much",
        "DistributedConfig(",
    ):
        assert text in answer.text


def test_what_transformers_and_tune_are_told_is_taken_by_them(ask, write):
    from transformers.distributed import DistributedConfig

    from moeforge_tune.stage import Tune

    known = {spec.flag for spec in specs(Tune.Options)}
    for gpus, model in ((16, write(**QWEN)), (32, write("dense.json", num_local_experts=None, num_hidden_layers=8))):
        best = ask(model, gpus=gpus, engine="transformers").data["best"]["transformers"]
        made = DistributedConfig(**best["distributed_config"])
        assert made.tp_size * made.fsdp_size * made.dp_replicate_size == gpus
        assert (made.ep_size, made.dp_size) == (best["ep"], best["dp"])
        words = shlex.split(best["command"])
        given = words[words.index("tune") + 2 :]
        assert {word for word in given if word.startswith("--")} <= known
        rows = int(given[given.index("--batch-size") + 1]) * int(given[given.index("--accumulate") + 1])
        assert rows * best["dp"] == 256


def test_ranks_that_fsdp_would_leave_without_an_expert_are_told(ask, write):
    answer = ask(write(), gpus=128, engine="transformers", top=0)
    why = "transformers: FSDP would leave ranks without an expert, which it cannot load; a larger --dp-replicate avoids it"
    assert answer.data["refused"][why] > 0
    assert why in answer.text
    for row in (*answer.data["ranked"], *answer.data["do_not_fit"]):
        assert row["edp"] // row["dp_replicate"] * row["ep"] <= 8
    assert why not in ask(write(**QWEN), gpus=16, engine="transformers").data["refused"]


def test_nothing_that_fits_ends_with_4_and_the_missing_gigabytes(ask, write):
    answer = ask(write(), gpus=8)
    assert answer.exit_code == ExitCode.GATE
    assert answer.data["ranked"] == []
    assert answer.data["best"] == {}
    rows = answer.data["do_not_fit"]
    assert all(row["missing_bytes"] > 0 and row["mfu"] is None for row in rows)
    assert f"{rows[0]['missing_bytes'] / 1e9:.1f} GB too much" in answer.text


def test_top_cuts_what_is_shown_and_json_lists_every_misfit(ask, write):
    few, every = ask(write(), gpus=128, top=2), ask(write(), gpus=128, top=0)
    assert len(few.data["ranked"]) == 2
    assert len(every.data["ranked"]) == every.data["fit"] == few.data["fit"]
    assert len(few.data["do_not_fit"]) == len(every.data["do_not_fit"])
    assert every.data["ranked"][0]["behind"] is None
    assert all(row["behind"] for row in every.data["ranked"][1:])


def test_options_change_the_question(ask, write):
    model = write(**QWEN)
    usual = ask(model, gpus=16).data["ranked"][0]
    assert (
        ask(model, gpus=16, memory=40.0).data["ranked"][0]["memory_bytes"]["total"]
        <= 40e9
        < usual["memory_bytes"]["total"]
    )
    assert ask(model, gpus=16, skew=2.0).data["ranked"][0]["step_s"] > usual["step_s"]
    assert ask(model, gpus=16, gpu="h200").data["memory_budget_bytes"] == 141e9
    slow = ask(model, gpus=16, node=4, network=5.0).data
    assert (slow["gpu"]["node"], slow["gpu"]["network"]) == (4, 5.0)
    assert slow["ranked"][0]["step_s"] > usual["step_s"]
    assert {row["engine"] for row in ask(model, gpus=16, training="4bit", top=0).data["ranked"]} == {"transformers"}
    assert (
        "ADAPTER" in ask(model, gpus=4, training="lora", engine="transformers").data["best"]["transformers"]["command"]
    )
    assert (
        "--optimizer adamw-8bit" in ask(model, gpus=16, optimizer="adamw-8bit").data["best"]["transformers"]["command"]
    )
    small = ask(model, gpus=16, objective="memory").data["ranked"]
    assert small[0]["memory_bytes"]["total"] < usual["memory_bytes"]["total"]


def test_a_directory_is_read_by_its_headers(ask, tmp_path):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
              "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 96, "tie_word_embeddings": False}  # fmt: skip
    tensors = {"model.embed_tokens.weight": (96, 32), "lm_head.weight": (96, 32), "model.norm.weight": (32,)}
    for layer in range(2):
        root = f"model.layers.{layer}."
        tensors |= {
            f"{root}self_attn.{n}_proj.weight": s
            for n, s in zip("qkvo", ((32, 32), (16, 32), (16, 32), (32, 32)), strict=True)
        }
        tensors |= {
            f"{root}mlp.{n}_proj.weight": s for n, s in (("gate", (64, 32)), ("up", (64, 32)), ("down", (32, 64)))
        }
        tensors |= {f"{root}{n}_layernorm.weight": (32,) for n in ("input", "post_attention")}
    directory = tmp_path / "model"
    directory.mkdir()
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in tensors.items()}
    save_file(arrays, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    data = ask(directory, gpus=2).data
    assert data["model"]["parameters"] == sum(int(np.prod(s)) for s in tensors.values() if len(s) > 1)
    assert data["notes"] == []
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": 40}))
    assert "more than the decoder that is planned for" in ask(directory, gpus=2).data["notes"][0]


def test_a_plan_of_a_model_that_is_not_written_yet(ask, monkeypatch):
    """What `upcycle --dry-run` prints, on stdin: sizes of the experts come from its headers."""
    config = {"model_type": "moeforge", "mixtures": [], "base_config": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 2, "vocab_size": 128, "tie_word_embeddings": True}}  # fmt: skip
    config["mixtures"] = [{"layers": [1], "router": {"top_k": 2}, "experts": {"count": 4, "width": 96}}]
    tensors = {"model.embed_tokens.weight": ["BF16", [128, 64]]}
    for layer in range(2):
        for name, rows in (("q", 64), ("k", 32), ("v", 32), ("o", 64)):
            tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = ["BF16", [rows, 64]]
    for root in ("0.mlp", *(f"1.mlp.experts.{e}" for e in range(4))):
        for name, shape in (("gate", [96, 64]), ("up", [96, 64]), ("down", [64, 96])):
            tensors[f"model.layers.{root}.{name}_proj.weight"] = ["BF16", shape]
    tensors["model.layers.1.mlp.gate.weight"] = ["BF16", [4, 64]]
    line = Artifact("plan", "-", plan={"config": config, "tensors": tensors}).line()
    monkeypatch.setattr("sys.stdin", io.StringIO(line + "\n"))
    model = ask(gpus=4).data["model"]
    assert (model["ref"], model["parameters"]) == (
        "the plan on stdin",
        sum(int(np.prod(s)) for _, s in tensors.values()),
    )
    assert (model["sparse_layers"], model["experts"], model["top_k"], model["expert_width"]) == (1, 4, 2, 96)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpu": "h10"}, r"--gpu h10: did you mean 'h100'\?"),
        ({"calibrate": True, "gpu": "h100"}, r"--calibrate measures this machine, and --gpu h100 asks for another"),
        ({"engine": "megatron", "training": "4bit"}, r"--training 4bit is bitsandbytes'"),
        ({"engine": "megatron", "optimizer": "adamw-8bit"}, r"--optimizer adamw-8bit is bitsandbytes'"),
        ({"gpu": "local"}, r"this machine was not measured .*run `moeforge plan --calibrate`"),
        ({"gpus": 0}, r"--gpus 0: must be at least 1"),
        ({"gpus": 7, "global_batch": 5, "engine": "transformers"}, r"no layout of .* on 7 GPUs can run: DP = 7"),
    ],
)
def test_what_cannot_be_asked(ask, write, values, message):
    with pytest.raises(UsageProblem, match=message):
        ask(write(), **values)


def test_what_is_no_model(ask, tmp_path, write):
    wrong = tmp_path / "list.json"
    wrong.write_text("[1]")
    with pytest.raises(BadInput, match=r"list\.json"):
        ask(wrong)
    with pytest.raises(BadInput, match="hidden_size = None"):
        ask(write(hidden_size=None))
    with pytest.raises(BadInput, match="no such file or directory"):
        ask(tmp_path / "gone" / "config.json")


def test_the_command_answers_without_torch(write):
    code = ("import sys; from moeforge.cli import main; sys.argv = ['moeforge', 'plan', sys.argv[1], '--gpus', '64', '--json'];\n"
            "try: main()\nexcept SystemExit as end: assert end.code in (0, None), end.code\n"
            "assert not {'torch', 'transformers'} & set(sys.modules)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, str(write())], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["gpus"] == 64
