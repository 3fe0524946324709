"""The processes that train one model together: sums, agreements and one place to keep things.

Plain data parallel: every process holds the whole model and takes its share of the rows. What a process that holds a part of the model
does otherwise is in moeforge.train.engine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import Interrupted, MoeforgeError, ReaderGone, UsageProblem

T = TypeVar("T")
PATIENCE = timedelta(hours=2)
"""How long a collective waits: the first process may be reading or writing hundreds of gigabytes meanwhile."""

BLOCK = 1 << 14
"""Numbers whose squares are added up in float32."""


class Ranks:
    """This process and its peers.

    Attributes:
        index, size: number of this process, and of all.
        data_rank, data_size: which share of the rows it takes, out of how many.
        scale: what a rank's loss is multiplied with, because its gradient will be divided by it.
        device: where it computes.
    """

    scale = 1.0

    def __init__(self, index: int, size: int, device: torch.device) -> None:
        self.index, self.size, self.device = index, size, device
        self.data_rank, self.data_size = index, size

    @classmethod
    def here(cls) -> Ranks:
        """As the launcher says; joins the others where there are any."""
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        # processes on CPUs are several only where it is told that they are on CPUs
        state = PartialState(
            cpu=parse_flag_from_env("ACCELERATE_USE_CPU", not torch.accelerator.is_available()), timeout=PATIENCE
        )
        assert state.device is not None
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def main(self) -> bool:
        """Whether this is the process that talks, and writes."""
        return self.index == 0

    def total(self, value: Tensor) -> Tensor:
        """The sum over ranks that see different rows."""
        if self.data_size == 1:
            return value
        summed = value.to(self.device, copy=True)
        self._add(summed)
        return summed

    def _add(self, value: Tensor) -> None:
        dist.all_reduce(value)

    def share(self, value: T) -> T:
        """The first process's value, on all: anything that can be pickled."""
        if self.size == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, 0, device=self.device)
        return told[0]

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()

    def agree(self, trouble: MoeforgeError | None) -> None:
        """Raise on every process what one of them has met, so that none waits for a peer that has given up.

        Raises:
            MoeforgeError: the trouble of the first process that has one.
        """
        if self.size == 1:
            if trouble is not None:
                raise trouble
            return
        met = torch.tensor(int(trouble is not None), device=self.device)
        dist.all_reduce(met, dist.ReduceOp.MAX)
        if met:
            told: list[Any] = [None] * self.size
            dist.all_gather_object(told, trouble)
            raise next(found for found in told if found is not None)

    def stop_together(self, check: Callable[[], None]) -> None:
        """Call `check`; where it wants one process to stop, all do.

        Raises:
            Interrupted, ReaderGone: what `check` raised on the first process that is to stop.
        """
        trouble = None
        try:
            check()
        except (Interrupted, ReaderGone) as error:
            trouble = error
        self.agree(trouble)

    def complete(self, master: Tensor) -> None:
        """Make `master.grad` that of all rows."""
        assert master.grad is not None
        if self.data_size > 1:
            dist.all_reduce(master.grad)

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """The Euclidean norm of all of them together, []."""
        if self.device.type != "cpu":
            return torch.nn.utils.get_total_norm(tensors, foreach=True)
        return torch.stack([_square(tensor) for tensor in tensors] or [torch.zeros(())]).sum().sqrt()

    def scale_(self, tensors: Sequence[Tensor], factor: Tensor) -> None:
        """Multiply in place."""
        for tensor in tensors:
            tensor.mul_(factor)

    def gathered(self, tensor: Tensor) -> Tensor | None:
        """The whole tensor on the first process, None on the others; every process must ask."""
        return tensor.detach() if self.main else None

    def part(self, whole: Tensor, like: Tensor) -> Tensor:
        """What this process holds of a tensor that all have whole, lying as `like` does."""
        return whole.to(like.device)

    def fill(self, tensor: Tensor, value: Tensor | None) -> None:
        """Put the first process's `value`, a whole tensor, into `tensor` on all."""
        with torch.no_grad():
            tensor.copy_(self.received(value, tensor))

    def received(self, value: Tensor | None, like: Tensor) -> Tensor:
        """The first process's `value` on all, lying as `like` does; a scalar where it is, as AdamW keeps its step counter on the CPU
        unless it is fused on an accelerator."""
        if self.size == 1:
            assert value is not None
            return value.to(like.device) if value.ndim else value
        shape, dtype = self.share((value.shape, value.dtype) if value is not None else None)  # pyright: ignore[reportGeneralTypeIssues]
        if not shape:
            return self.share(value)  # pyright: ignore[reportReturnType]
        sent = torch.empty(shape, dtype=dtype) if value is None else value
        sent = sent.to(self.device).contiguous()
        dist.broadcast(sent, 0)
        return sent

    def settle(self, model: nn.Module) -> None:
        """Put a model in order after passes without a backward one."""


def _square(tensor: Tensor) -> Tensor:
    """The squared norm in float64, [], block by block: torch adds up on a processor in float32 one after the other, which loses 2e-4
    of the norm of 7 million numbers, and less of each half of them."""
    flat = tensor.detach().reshape(-1)
    whole = len(flat) // BLOCK * BLOCK
    parts = torch.linalg.vector_norm(flat[:whole].view(-1, BLOCK), dim=1), torch.linalg.vector_norm(flat[whole:])
    return sum(part.double().square().sum() for part in parts)  # pyright: ignore[reportReturnType]


@contextlib.contextmanager
def joined(world: int | None) -> Iterator[Ranks]:
    """Within the block, this process and its peers; at its end they wait for each other and part.

    Args:
        world: how many there should be; None: as many as there are.

    Raises:
        MoeforgeError: a peer died; what it says is of no use to anyone, and is kept as the cause.
    """
    ranks = Ranks.here()
    if world not in (None, ranks.size):
        raise UsageProblem(f"the layout needs {world} processes, and there {'is one' if ranks.size == 1 else f'are {ranks.size}'}: "
                           f"torchrun --nproc-per-node {world} $(which moeforge) tune ... starts them on one machine")  # fmt: skip
    if ranks.size == 1:
        yield ranks
        return
    try:
        yield ranks
        # a process that goes while another still sends would look like one that died
        dist.barrier()
    except RuntimeError as error:
        # NCCL has types of its own, gloo has not
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise MoeforgeError("another rank has ended, so this one cannot go on; see what that one said; the "
                            "same command continues from the last saved state") from error  # fmt: skip
    finally:
        dist.destroy_process_group()
