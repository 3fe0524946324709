"""The byte formulas beside the bytes that transformers' collectives move on four ranks."""

import json
import os
import subprocess
import sys

import pytest

from moeforge_plan import traffic
from moeforge_plan.job import Job
from moeforge_plan.layouts import Layout
from moeforge_plan.shape import Shape

EXPERTS, ACTIVE, WIDTH, TOKENS = 8, 2, 32, 64
CASES = [(1, 4), (2, 4), (2, 2), (1, 2)]
"""(TP, EP) of four ranks; FSDP takes the rest."""


class Count:
    """Stands where a collective stands, and counts what leaves this rank."""

    def __init__(self, call, sizes):
        self.call, self.sizes, self.sent = call, sizes, 0

    def __call__(self, tensor, *args, **kwargs):
        self.sent += self.sizes(tensor, *args, **kwargs)
        return self.call(tensor, *args, **kwargs)


def exchange(rank, folder):
    """Each case on this rank: balanced routing through transformers' dispatcher, in a model-free layer."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from transformers.distributed import DistributedConfig, expert_parallel
    from transformers.distributed.utils import initialize_distributed_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=4)

    class Experts(nn.Module):
        """Returns its rows; transformers shards `num_experts` before it wraps it."""

        def __init__(self, local):
            super().__init__()
            self.num_experts = local

        def forward(self, rows, index, weights):
            return rows * weights

    found = {}
    for tp, ep in CASES:
        _, mesh = initialize_distributed_mesh(DistributedConfig(tp_size=tp, fsdp_size=4 // tp, ep_size=ep))
        group = mesh.get_mesh("ep").get_group()
        here = dist.get_rank(group)

        def leaving(tensor, receive, send, group, here=here):
            return (
                sum(size for peer, size in enumerate(send) if peer != here) * tensor.shape[-1] * tensor.element_size()
            )

        real = expert_parallel.all_to_all_single_autograd
        expert_parallel.all_to_all_single_autograd = counted = Count(real, leaving)
        layer = expert_parallel.AllToAllEP(Experts(EXPERTS // ep), mesh.get_mesh("ep"), mesh.get_mesh("tp"))
        torch.manual_seed(rank // tp)  # the ranks of a TP group hold the same tokens
        hidden = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16)
        index = (torch.arange(TOKENS)[:, None] * ACTIVE + torch.arange(ACTIVE)) % EXPERTS
        weights = torch.rand(TOKENS, ACTIVE, dtype=torch.bfloat16)
        out = layer(hidden, index, weights)
        assert torch.allclose(out.float(), (hidden[:, None] * weights[..., None]).sum(1).float(), atol=0.05)
        expert_parallel.all_to_all_single_autograd = real
        found[f"{tp},{ep}"] = counted.sent
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_the_all_to_all_moves_what_the_formula_says(tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for attempt in range(2):  # gloo may die of a signal; a wrong count is no signal
        folder = tmp_path / str(attempt)
        folder.mkdir()
        started = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=env) for rank in range(4)]
        codes = [process.wait(240) for process in started]
        if not any(code < 0 for code in codes):
            break
    assert codes == [0, 0, 0, 0]
    counted = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]
    shape = Shape(1, WIDTH, 4, 4, 8, 100, False, 1, 0, 1, EXPERTS, ACTIVE, 16)
    for tp, ep in CASES:
        layout = Layout("transformers", 4, tp, 1, 1, ep, 1, 1, "parameters")
        expected = traffic.layer(shape, layout, 1, Job(TOKENS, 4), sparse=True).a2a
        assert expected > 0
        assert [rank[f"{tp},{ep}"] for rank in counted] == [expected] * 4, (tp, ep)


if __name__ == "__main__":
    exchange(int(sys.argv[1]), sys.argv[2])
