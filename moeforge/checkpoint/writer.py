"""Carries out a conversion: reads, transforms and writes overlap; memory is bounded; what is finished survives a kill.

Every output file is created at its final size with its header, and tensors are written to their places in any order by a
pool of threads. A tensor's bytes pass through memory once, to be hashed, and go from there to every place that wants
them: measured on ext4, writing the piece that the hash has just pulled into the processor's cache is as fast as
`copy_file_range`, which would read it again from the page cache (and cannot share blocks, as tensors do not start at block
boundaries). A file is synced in the background as it grows, so that the disk works from the first second.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import MachineLacks, MoeforgeError
from .digest import PREFIX, cores, join_digests, safetensors_digest
from .feed import PIECE, Feed, bytes_of, op_memory
from .index import INDEX, STEM, encode_index
from .ops import TensorOp, check_op
from .shards import MAX_SHARD_BYTES, PT_METADATA, Shard, plan_shards
from .tensor import SAFETENSORS_DTYPES, TensorInfo

__all__ = ["Shard", "WrittenCheckpoint", "op_memory", "plan_shards", "write_checkpoint"]

MAX_MEMORY = 256_000_000
SYNC_EVERY = 128_000_000
"""Written bytes after which a file is synced in the background."""
TICK = 0.1
"""Seconds between progress reports and checks for cancellation."""


class JournalLike(Protocol):
    """What :class:`moeforge.pipeline.workspace.Journal` offers."""

    finished: dict[str, dict[str, Any]]

    def record(self, file: str, info: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class WrittenCheckpoint:
    """What was written.

    Attributes:
        files: file name -> `sha256:...` (see :mod:`moeforge.checkpoint.digest`), index included.
        tensor_digests: tensor name -> sha256 of its bytes (hex).
        bytes_written: bytes of all files, kept ones included.
        bytes_copied: tensor bytes that went from file to file without a transform.
        bytes_kept: bytes of files that an earlier, interrupted run had finished.
    """

    files: dict[str, str]
    tensor_digests: dict[str, str]
    bytes_written: int
    bytes_copied: int
    bytes_kept: int


def write_checkpoint(
    ops: Sequence[TensorOp],
    out_dir: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = PT_METADATA,
    stem: str = STEM,
    workers: int | None = None,
    max_memory: int | None = None,
    journal: JournalLike | None = None,
    on_bytes: Callable[[int], Any] | None = None,
    check: Callable[[], Any] | None = None,
) -> WrittenCheckpoint:
    """Write the outputs of `ops` as safetensors into `out_dir`; an index too when there are several files.

    The bytes depend on the ops and `max_shard_bytes` alone: not on threads, memory, order or interruptions.

    Args:
        stem: how the files are called (`model` or `adapter_model`).
        workers: threads that read, transform, hash and write; default: one a core, at most four.
        max_memory: bytes of tensors in flight (an estimate); one op that needs more runs alone.
        journal: files in `journal.finished` whose bytes still have the recorded digest are kept; the others are written
            and recorded as each is whole and synced.
        on_bytes: called from this thread with counts of bytes that are done; they add up to the tensors' bytes.
        check: called from this thread for every op and at least every tenth of a second; may raise to stop.

    Raises:
        BadInput: the plan is impossible (a name twice, a copy into another dtype or shape), or a source is damaged
            or holds weights that are infinite or not a number.
        MachineLacks: the disk has too little room.
        MoeforgeError: an op computed something else than planned.
    """
    for op in ops:
        check_op(op)
    shards = plan_shards((info for op in ops for info in op.outputs), max_shard_bytes, metadata, stem)
    run = _Run(out_dir, workers or min(cores(), 4), max_memory or MAX_MEMORY, journal,
               on_bytes or (lambda _: None), check or (lambda: None))  # fmt: skip
    run.execute(ops, shards)
    digests = run.tensor_digests
    files = {shard.name: join_digests(shard.layout, digests) for shard in shards}
    written = sum(shard.total_bytes for shard in shards)
    if len(shards) > 1:
        weight_map = {info.name: shard.name for shard in shards for info in shard.tensors}
        index = encode_index(weight_map, sum(info.nbytes for shard in shards for info in shard.tensors))
        _write_atomically(out_dir / INDEX, index)
        files[INDEX] = PREFIX + hashlib.sha256(index).hexdigest()
        written += len(index)
    return WrittenCheckpoint(files, {name: digests[name] for shard in shards for name in shard.layout.tensors},
                             written, run.copied, run.kept)  # fmt: skip


def _write_atomically(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


@dataclass
class _File:
    """An output file that is being written."""

    shard: Shard
    fd: int
    missing: int
    """Tensors not yet written."""
    unsynced: int = 0


@dataclass
class _Target:
    """One place of a tensor in an output file."""

    file: _File
    offset: int


@dataclass
class _Done:
    """What one op has written."""

    digests: dict[str, str]
    copied: int = 0
    written: list[tuple[_File, int]] = field(default_factory=list)


class _Stopped(Exception):
    """Raised inside workers after another thread has failed."""


class _Run:
    """The state of one `write_checkpoint`. Only `_work` and what it calls run in worker threads."""

    def __init__(self, out_dir: Path, workers: int, max_memory: int, journal: JournalLike | None,
                 on_bytes: Callable[[int], Any], check: Callable[[], Any]):  # fmt: skip
        self.out_dir, self.workers, self.max_memory, self.journal = out_dir, workers, max_memory, journal
        self.on_bytes, self.check = on_bytes, check
        self.tensor_digests: dict[str, str] = {}
        self.copied = self.kept = 0
        self._targets: dict[str, _Target] = {}
        self._pending: dict[Future, int] = {}
        self._syncing: dict[Future, _File | None] = {}
        self._memory = 0
        self._stop = threading.Event()
        self._progress, self._reported = 0, 0
        self._lock = threading.Lock()
        self._feed = Feed()

    def execute(self, ops: Sequence[TensorOp], shards: Sequence[Shard]) -> None:
        unfinished = [shard for shard in shards if not self._keep(shard)]
        files: list[_File] = []
        try:
            with ThreadPoolExecutor(self.workers) as pool, ThreadPoolExecutor(1) as syncer:
                try:
                    self._create(unfinished, files)
                    for op in ops:
                        self._submit(op, pool, syncer)
                    while self._pending or self._syncing:
                        self._collect(syncer)
                except BaseException:
                    self._stop.set()
                    for future in (*self._pending, *self._syncing):
                        future.cancel()
                    raise
        finally:
            for file in files:
                os.close(file.fd)
        self._report()

    # -- files

    def _keep(self, shard: Shard) -> bool:
        """Whether an earlier run finished this file, by its bytes; takes over its digests if so."""
        info = self.journal.finished.get(shard.name) if self.journal else None
        path = self.out_dir / shard.name
        if info is None or not path.is_file() or path.stat().st_size != shard.total_bytes:
            return False
        with open(path, "rb") as file:
            if file.read(len(shard.header)) != shard.header:
                return False

        digest, tensors = safetensors_digest(path, lambda _: self.check())
        if digest != info.get("digest"):
            return False
        self.tensor_digests |= tensors
        self.on_bytes(shard.total_bytes - len(shard.header))
        self.kept += shard.total_bytes
        return True

    def _create(self, shards: Sequence[Shard], files: list[_File]) -> None:
        """Create the files at full size with their headers, after checking that the disk has room."""
        for shard in shards:
            (self.out_dir / shard.name).unlink(missing_ok=True)
        check_room(self.out_dir, sum(shard.total_bytes for shard in shards))
        for shard in shards:
            fd = os.open(self.out_dir / shard.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            file = _File(shard, fd, len(shard.tensors))
            files.append(file)
            os.ftruncate(fd, shard.total_bytes)
            _write(fd, memoryview(shard.header), 0)
            for name, offset in shard.layout.offsets.items():
                self._targets[name] = _Target(file, offset)
        directory = os.open(self.out_dir, os.O_RDONLY)
        try:
            os.fsync(directory)  # the journal may only name files that are there after a power cut
        finally:
            os.close(directory)

    # -- the calling thread: hands out ops, collects results

    def _submit(self, op: TensorOp, pool: ThreadPoolExecutor, syncer: ThreadPoolExecutor) -> None:
        self.check()
        if not any(info.name in self._targets for info in op.outputs):
            return
        weight = op_memory(op)
        while self._pending and (self._memory + weight > self.max_memory or len(self._pending) >= 4 * self.workers):
            self._collect(syncer)
        self._memory += weight
        self._pending[pool.submit(self._work, op)] = weight

    def _collect(self, syncer: ThreadPoolExecutor) -> None:
        """Wait for something to finish, at most one tick, and account for it."""
        done, _ = wait([*self._pending, *self._syncing], TICK, FIRST_COMPLETED)
        for future in done:
            if future in self._pending:
                self._memory -= self._pending.pop(future)
                result: _Done = future.result()
                self.tensor_digests |= result.digests
                self.copied += result.copied
                for file, nbytes in result.written:
                    file.missing -= 1
                    file.unsynced += nbytes
                    self._sync(file, syncer)
            else:
                file = self._syncing.pop(future)
                future.result()
                if file is not None and self.journal is not None:
                    names = [info.name for info in file.shard.tensors]
                    digests = {name: self.tensor_digests[name] for name in names}
                    info = {"bytes": file.shard.total_bytes, "digest": join_digests(file.shard.layout, digests)}
                    self.journal.record(file.shard.name, info)
        self._report()
        self.check()

    def _sync(self, file: _File, syncer: ThreadPoolExecutor) -> None:
        whole = file.missing == 0
        if whole or file.unsynced >= SYNC_EVERY:
            file.unsynced = 0
            self._syncing[syncer.submit(os.fsync, file.fd)] = file if whole else None

    def _report(self) -> None:
        with self._lock:
            fresh, self._reported = self._progress - self._reported, self._progress
        if fresh:
            self.on_bytes(fresh)

    # -- worker threads

    def _work(self, op: TensorOp) -> _Done:
        done = _Done({})
        for data, infos in (
            [(self._feed.copied(op.inputs[0]), op.outputs)] if op.compute is None else self._computed(op)
        ):
            wanted = [info for info in infos if info.name in self._targets]
            targets = [self._targets[info.name] for info in wanted]
            if targets:
                digest, nbytes = self._stream(data, targets)
                done.digests |= {info.name: digest for info in wanted}
                done.written += [(target.file, nbytes) for target in targets]
                done.copied += nbytes * len(targets) if op.compute is None else 0
        return done

    def _stream(self, data: Iterator[memoryview], targets: Sequence[_Target]) -> tuple[str, int]:
        """Hash pieces and write each to every target; returns the digest (hex) and the length."""
        state, at = hashlib.sha256(), 0
        for piece in data:
            if self._stop.is_set():
                raise _Stopped
            state.update(piece)
            for target in targets:
                _write(target.file.fd, piece, target.offset + at)
            at += len(piece)
            with self._lock:
                self._progress += len(piece) * len(targets)
        return state.hexdigest(), at

    def _computed(self, op: TensorOp) -> Iterator[tuple[Iterator[memoryview], list[TensorInfo]]]:
        """The bytes of each distinct array, with the outputs that it fills.

        Raises:
            MoeforgeError: count, dtype or shape is not what was planned.
        """
        assert op.compute is not None
        result = op.compute(*self._feed.arrays(op))
        made = [np.asarray(result)] * len(op.outputs) if isinstance(result, np.ndarray | np.generic) else list(result)
        if len(made) != len(op.outputs):
            raise MoeforgeError(
                f"{op.outputs[0].name!r} ({op.note}): {len(made)} arrays computed for {len(op.outputs)} outputs"
            )
        groups: dict[int, tuple[np.ndarray, list[TensorInfo]]] = {}
        for array, info in zip(made, op.outputs, strict=True):
            dtype = SAFETENSORS_DTYPES.get(array.dtype, str(array.dtype))
            if (dtype, array.shape) != (info.dtype, info.shape):
                raise MoeforgeError(f"{info.name!r} ({op.note}): planned {info.dtype} {list(info.shape)}, computed "
                                    f"{dtype} {list(array.shape)}")  # fmt: skip
            groups.setdefault(id(array), (array, []))[1].append(info)
        for array, infos in groups.values():
            data = bytes_of(array)
            yield (data[at : at + PIECE] for at in range(0, len(data), PIECE)), infos


def check_room(directory: Path, nbytes: int) -> None:
    """Refuse what the disk has no room for before an hour is spent on it.

    Raises:
        MachineLacks: with both numbers.
    """
    free = shutil.disk_usage(directory).free
    if nbytes > free:
        raise MachineLacks(f"{directory}: {nbytes / 1e9:.3f} GB are to be written but the disk has {free / 1e9:.3f} GB free; "
                           "free some room or choose another -o")  # fmt: skip


def _write(fd: int, data: memoryview, offset: int) -> None:
    while len(data):
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done
