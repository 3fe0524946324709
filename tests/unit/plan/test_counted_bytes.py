"""The byte formulas beside the bytes that transformers moves on four ranks, collective by collective."""

import collections
import json
import os
import subprocess
import sys

import pytest

from moeforge_plan import traffic
from moeforge_plan.job import Job
from moeforge_plan.layouts import Layout, empty_shards, rules
from moeforge_plan.memory import expert_share, params
from moeforge_plan.shape import read

CONFIG = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2}  # fmt: skip
TOKENS = 64
NORMS, LAST_NORM = 2 * (2 * 32 + 2 * 8) + 32, 32
"""Parameters that no formula counts, whole on every TP rank."""
DISPATCH = [(1, 4), (2, 4), (2, 2), (1, 2)]
"""(TP, EP) of four ranks; FSDP takes the rest."""
MODELS = [(1, 4, 1, 1), (1, 4, 1, 4), (1, 2, 2, 2), (2, 2, 1, 4)]
"""(TP, FSDP, replicas, EP)."""
HELD = [(8, 1, 4, 1), (8, 1, 4, 2), (8, 2, 2, 2), (6, 1, 4, 1), (2, 1, 4, 1), (2, 1, 4, 2)]
"""(experts, TP, FSDP, EP); the last three leave ranks without any: 6 over 4 ranks are 2, 2, 2 and 0."""


def dispatched(rank, folder):
    """Bytes that leave this rank in balanced routing through transformers' dispatcher, a layer without a model."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from transformers.distributed import DistributedConfig, expert_parallel
    from transformers.distributed.utils import initialize_distributed_mesh

    class Experts(nn.Module):
        """Returns its rows; transformers shards `num_experts` before it wraps it."""

        def __init__(self, local):
            super().__init__()
            self.num_experts = local

        def forward(self, rows, index, weights):
            return rows * weights

    found, real = {}, expert_parallel.all_to_all_single_autograd
    experts, active, width = (CONFIG[key] for key in ("num_experts", "num_experts_per_tok", "hidden_size"))
    for tp, ep in DISPATCH:
        _, mesh = initialize_distributed_mesh(DistributedConfig(tp_size=tp, fsdp_size=4 // tp, ep_size=ep))
        here, sent = dist.get_rank(mesh.get_mesh("ep").get_group()), []

        def counted(tensor, receive, send, group, here=here, sent=sent):
            sent.append(
                sum(n for peer, n in enumerate(send) if peer != here) * tensor.shape[-1] * tensor.element_size()
            )
            return real(tensor, receive, send, group)

        expert_parallel.all_to_all_single_autograd = counted
        layer = expert_parallel.AllToAllEP(Experts(experts // ep), mesh.get_mesh("ep"), mesh.get_mesh("tp"))
        torch.manual_seed(rank // tp)  # the ranks of a TP group hold the same tokens
        hidden = torch.randn(TOKENS, width, dtype=torch.bfloat16)
        index = (torch.arange(TOKENS)[:, None] * active + torch.arange(active)) % experts
        weights = torch.rand(TOKENS, active, dtype=torch.bfloat16)
        out = layer(hidden, index, weights)
        assert torch.allclose(out.float(), (hidden[:, None] * weights[..., None]).sum(1).float(), atol=0.05)
        found[f"{tp},{ep}"] = sum(sent)
    expert_parallel.all_to_all_single_autograd = real
    return found


def trained(rank, folder):
    """Bytes of one forward and backward pass of a tiny model, by collective: whole tensors gathered, reduced, summed."""
    import torch
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.distributed import DistributedConfig

    class Counted(TorchDispatchMode):
        bytes = collections.Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = str(func)
            if "c10d" in name:
                flat = [t for arg in args for t in (arg if isinstance(arg, list | tuple) else [arg])]
                self.bytes[name] += max((t.nbytes for t in flat if isinstance(t, torch.Tensor)), default=0)
            return func(*args, **(kwargs or {}))

    if rank == 0:
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG)).save_pretrained(f"{folder}/model")
    dist.barrier()
    found = {}
    for tp, fsdp, replicate, ep in MODELS:
        config = DistributedConfig(
            tp_size=tp, fsdp_size=fsdp, dp_replicate_size=replicate, ep_size=ep, fsdp_mixed_precision=True
        )
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32, distributed_config=config)
        torch.manual_seed(rank // tp)
        ids = torch.randint(0, CONFIG["vocab_size"], (1, TOKENS))
        with Counted() as counted:
            counted.bytes = collections.Counter()
            model(input_ids=ids).logits.float().square().mean().backward()
        found[f"{tp},{fsdp},{replicate},{ep}"] = counted.bytes
    return found


def held(rank, folder):
    """Parameters of experts that this rank keeps; None where transformers cannot load its part."""
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.distributed import DistributedConfig

    found = {}
    for experts, tp, fsdp, ep in HELD:
        place = f"{folder}/experts-{experts}"
        if rank == 0 and not os.path.exists(place):
            Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**CONFIG, "num_experts": experts})).save_pretrained(place)
        dist.barrier()
        config = DistributedConfig(tp_size=tp, fsdp_size=fsdp, ep_size=ep)
        try:
            model = AutoModelForCausalLM.from_pretrained(place, distributed_config=config)
        except RuntimeError as error:
            assert "conversion of the weights" in str(error)
            found[f"{experts},{tp},{fsdp},{ep}"] = None
        else:
            mine = [p.to_local() for name, p in model.named_parameters() if ".experts." in name]
            found[f"{experts},{tp},{fsdp},{ep}"] = sum(p.numel() for p in mine)
    return found


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """What each of four ranks counted; one spawn for all."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for _ in range(2):  # gloo may die of a signal; a wrong count is no signal
        folder = tmp_path_factory.mktemp("ranks")
        started = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=env) for rank in range(4)]
        codes = [process.wait(300) for process in started]
        if not any(code < 0 for code in codes):
            break
    assert codes == [0, 0, 0, 0]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "ep"), DISPATCH)
def test_the_all_to_all_moves_what_the_formula_says(counted, tp, ep):
    layout = Layout("transformers", 4, tp, 1, 1, ep, 1, 1, "parameters")
    expected = traffic.layer(read({"model_type": "qwen3_moe", **CONFIG}), layout, 1, Job(TOKENS, 4), sparse=True).a2a
    assert expected > 0
    assert [rank["dispatched"][f"{tp},{ep}"] for rank in counted] == [expected] * 4


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "fsdp", "replicate", "ep"), MODELS)
def test_fsdp_moves_what_the_formula_says(counted, tp, fsdp, replicate, ep):
    """Two gathers of bfloat16, but one of the last norm and the head, which stay; one reduction in float32; a sum over replicas.

    In every case the experts' FSDP group is attention's, or one rank: a gathered tensor moves (FSDP-1)/FSDP of its bytes.
    """
    layout = Layout("transformers", 4, tp, 1, 1, ep, 1, replicate, "parameters")
    assert layout.efsdp in (1, fsdp)
    moved = traffic.sync(read({"model_type": "qwen3_moe", **CONFIG}), layout, Job(TOKENS, 4))
    share, head = (fsdp - 1) / fsdp, CONFIG["vocab_size"] * CONFIG["hidden_size"] / tp
    for rank in counted:
        sent = collections.Counter(rank["trained"][f"{tp},{fsdp},{replicate},{ep}"])
        gathered = moved.gather_dense + moved.gather_expert + share * (4 * NORMS - 2 * (head + LAST_NORM))
        assert share * sent["c10d._allgather_base_.default"] == gathered
        assert (
            share * sent["c10d._reduce_scatter_base_.default"]
            == moved.reduce_dense + moved.reduce_expert + share * 4 * NORMS
        )
        if replicate > 1:
            around = 2 * (replicate - 1) / replicate
            assert around * sent["c10d.allreduce_.default"] == moved.replicas + around * 4 * NORMS / fsdp


@pytest.mark.slow
def test_tensor_parallel_moves_what_the_formula_says(counted):
    """TP 2 with EP 4, forward and backward, two layers: attention's partial outputs are summed, the slices of the experts' outputs
    gathered; beside these stand the embedding's sum and what the head gathers."""
    layout = Layout("transformers", 4, 2, 1, 1, 4, 1, 1, "parameters")
    moved = traffic.layer(read({"model_type": "qwen3_moe", **CONFIG}), layout, 1, Job(TOKENS, 4), sparse=True)
    hidden = 2 * TOKENS * CONFIG["hidden_size"]
    for rank in counted:
        sent = collections.Counter(rank["trained"]["2,2,1,4"])
        # an all-reduce of n bytes over two ranks sends n
        assert sent["_c10d_functional.all_reduce.default"] >= 2 * 2 * moved.tp_attention + hidden
        logits = 2 * TOKENS * CONFIG["vocab_size"] / 2
        assert sent["_c10d_functional.all_gather_into_tensor.default"] >= 2 * 2 * moved.tp_ffn + logits


@pytest.mark.slow
@pytest.mark.parametrize(("experts", "tp", "fsdp", "ep"), HELD)
def test_the_fullest_rank_holds_what_the_formula_says(counted, experts, tp, fsdp, ep):
    """FSDP cuts the axis that counts experts, and a rank that gets none cannot be loaded."""
    shape = read({"model_type": "qwen3_moe", **CONFIG, "num_experts": experts})
    layout = Layout("transformers", 4, tp, 1, 1, ep, 1 if ep > 1 else tp, 1, "parameters")
    kept = [rank["held"][f"{experts},{tp},{fsdp},{ep}"] for rank in counted]
    empty = empty_shards(experts // ep, layout.efsdp)
    assert kept.count(None) == empty * ep
    assert max(size for size in kept if size is not None) == params(shape, layout).expert * expert_share(shape, layout)
    refused = rules(layout, experts=experts, heads=4, kv_heads=4, layers=2)
    assert bool(refused) == bool(empty)


if __name__ == "__main__":
    import torch
    import torch.distributed

    me, where = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{where}/meeting", rank=me, world_size=4)
    body = {"dispatched": dispatched(me, where), "trained": trained(me, where), "held": held(me, where)}
    with open(f"{where}/{me}.json", "w") as file:
        json.dump(body, file)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
