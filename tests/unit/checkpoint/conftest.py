"""Small checkpoints written by the reference library, not by ours."""

import json

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def state():
    """Odd shapes and every kind of tensor: a scalar, an empty one, one byte an element, wide and narrow dtypes."""
    gen = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(*shape, generator=gen)

    return {
        "model.embed.weight": normal(13, 5).bfloat16(),
        "model.layers.0.up.weight": normal(7, 5).bfloat16(),
        "model.layers.0.norm.weight": normal(5),
        "model.layers.1.up.weight": normal(7, 5).half(),
        "model.layers.1.codes": torch.randint(0, 256, (3, 3, 3), generator=gen, dtype=torch.uint8),
        "model.layers.1.scale": torch.tensor(2.5, dtype=torch.float64),
        "model.layers.1.none": torch.zeros(0, 4, dtype=torch.int32),
        "model.layers.1.fp8": normal(3, 5).to(torch.float8_e4m3fn),
        "model.layers.1.mask": torch.tensor([True, False, True]),
    }


@pytest.fixture
def save():
    """`save(state, directory, shards=1)`: a checkpoint directory in Hugging Face layout."""

    def save(state, directory, shards=1):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text('{"model_type": "test", "hidden_size": 5}')
        (directory / "tokenizer.json").write_text("{}")
        if shards == 1:
            save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
            return directory
        placed = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: tensor for j, (name, tensor) in enumerate(state.items()) if j % shards == i}
            save_file(part, directory / file, metadata={"format": "pt"})
            placed |= dict.fromkeys(part, file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
        return directory

    return save


@pytest.fixture
def raw():
    """A torch tensor's bytes."""
    return lambda tensor: tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
