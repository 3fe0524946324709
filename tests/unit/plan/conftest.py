"""The verb, asked in this process."""

import io
import json

import pytest

from moeforge import options as forge_options
from moeforge.pipeline.context import Context
from moeforge.pipeline.progress import Progress
from moeforge_plan.plan import Plan

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 6144, "intermediate_size": 16384,
    "num_attention_heads": 48, "num_key_value_heads": 8, "num_hidden_layers": 56, "num_local_experts": 8,
    "num_experts_per_tok": 2, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def ask(tmp_path):
    """`ask(model, gpus=8)`: the Answer; what is not JSON is an error."""

    def run(model="-", **values):
        ctx = Context("plan", Progress("plan", "none", True, io.StringIO()), tmp_path / "home")
        answer = Plan().answer([], forge_options.build(Plan.Options, {"model": str(model), **values}), ctx)
        json.dumps(answer.data, allow_nan=False)
        return answer

    return run


@pytest.fixture
def write(tmp_path):
    """Write a config.json alone: `write(hidden_size=...)` over Mixtral-8x22B's; None removes a key."""

    def config(name="config.json", **changes):
        path = tmp_path / name
        body = {key: value for key, value in {**MIXTRAL, **changes}.items() if value is not None}
        path.write_text(json.dumps(body))
        return path

    return config
