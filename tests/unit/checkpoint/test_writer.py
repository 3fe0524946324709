"""Writing: the planned bytes, whatever the threads, the memory, or the moment at which it was interrupted."""

import json
import os
import random
import threading
import time
from collections import namedtuple

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from moeforge.checkpoint import Input, TensorInfo, TensorOp, open_checkpoint
from moeforge.checkpoint import feed as feed_module
from moeforge.checkpoint import writer as writer_module
from moeforge.checkpoint.digest import file_digest, safetensors_digest
from moeforge.checkpoint.writer import plan_shards, write_checkpoint
from moeforge.errors import BadInput, MachineLacks, MoeforgeError

BF16 = np.dtype(ml_dtypes.bfloat16)
MB = 1_000_000


class Journal:
    """The contract of the pipeline's journal, in memory."""

    def __init__(self):
        self.finished = {}

    def record(self, file, info):
        json.dumps(info)
        self.finished[file] = info


@pytest.fixture
def source(state, save, tmp_path):
    with open_checkpoint(save(state, tmp_path / "source", 2)) as checkpoint:
        yield checkpoint


@pytest.fixture
def out(tmp_path):
    made = tmp_path / "out"
    made.mkdir()
    return made


def fan_out(source, copies=3):
    """Every tensor to several outputs, some rows of one, one computed for all outputs and one computed a piece each."""
    ops = [TensorOp(tuple(TensorInfo(f"e{k}.{name}", info.dtype, info.shape) for k in range(copies)), (Input(source, name),))
           for name, info in source.tensors.items()]  # fmt: skip
    embed = "model.embed.weight"
    ops.insert(3, TensorOp((TensorInfo("rows", "BF16", (4, 5)),), (Input(source, embed, slice(2, 6)),)))
    ops.insert(5, TensorOp(tuple(TensorInfo(f"twice.{k}", "F32", (13, 5)) for k in range(copies)), (Input(source, embed),),
                           lambda w: w.astype(np.float32) * 2, note="doubled"))  # fmt: skip
    ops.append(TensorOp(tuple(TensorInfo(f"part.{k}", "BF16", (13 - k, 5)) for k in range(copies)), (Input(source, embed),),
                        lambda w: [w[k:] for k in range(copies)]))  # fmt: skip
    ops.append(TensorOp((TensorInfo("sum", "F32", ()),), (Input(source, embed), Input(source, embed, slice(0, 1))),
                        lambda a, b: np.float32(a.sum() + b.sum()).reshape(())))  # fmt: skip
    ops.append(TensorOp((TensorInfo("zeros", "I8", (0, 3)),), (), lambda: np.zeros((0, 3), np.int8)))
    return ops


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def tensors(directory):
    """What the reference library reads: name -> (dtype, shape, bytes)."""
    import torch

    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(name)
                found[name] = (
                    str(tensor.dtype),
                    tuple(tensor.shape),
                    tensor.reshape(-1).view(torch.uint8).numpy().tobytes(),
                )
    return found


@pytest.mark.parametrize("max_shard", [1, 200, 10**9])
def test_the_reference_library_reads_what_was_planned(source, out, state, raw, max_shard):
    ops = fan_out(source)
    done = write_checkpoint(ops, out, max_shard_bytes=max_shard)
    found = tensors(out)
    for name, tensor in state.items():
        for k in range(3):
            assert found[f"e{k}.{name}"] == (str(tensor.dtype), tuple(tensor.shape), raw(tensor))
    embed = state["model.embed.weight"]
    assert found["rows"][2] == raw(embed[2:6])
    assert found["twice.1"][2] == raw(embed.float() * 2)
    assert [found[f"part.{k}"][2] for k in range(3)] == [raw(embed[k:]) for k in range(3)]
    assert found["zeros"] == ("torch.int8", (0, 3), b"")
    assert len(found) == len(done.tensor_digests) == sum(len(op.outputs) for op in ops)

    planned = plan_shards((info for op in ops for info in op.outputs), max_shard)
    files = contents(out)
    assert {shard.name: shard.total_bytes for shard in planned} == {
        n: len(d) for n, d in files.items() if n.endswith(".safetensors")
    }
    assert done.files == {name: file_digest(out / name) for name in files}
    assert done.bytes_written == sum(map(len, files.values()))
    assert done.bytes_copied == 3 * sum(info.nbytes for info in source.tensors.values()) + 40
    for name in files:
        if name.endswith(".safetensors"):
            assert safetensors_digest(out / name)[1].items() <= done.tensor_digests.items()
    if len(planned) == 1:
        assert set(files) == {"model.safetensors"}
    else:
        index = json.loads(files["model.safetensors.index.json"])
        assert index["weight_map"] == dict(sorted((i.name, s.name) for s in planned for i in s.tensors))
        assert list(index["weight_map"]) == sorted(index["weight_map"])
        assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in found.values())


def test_a_whole_directory_opens_again(source, out):
    write_checkpoint(fan_out(source), out, max_shard_bytes=300)
    (out / "config.json").write_text("{}")
    with open_checkpoint(out) as written:
        assert written.read("e2.model.embed.weight").tobytes() == source.read("model.embed.weight").tobytes()


def test_same_bytes_for_any_number_of_threads_and_any_memory(source, tmp_path):
    results = []
    for workers, memory in [(1, None), (2, 1), (4, 1000), (3, 10**9), (None, None)]:
        out = tmp_path / f"out-{workers}-{memory}"
        out.mkdir()
        done = write_checkpoint(fan_out(source), out, max_shard_bytes=400, workers=workers, max_memory=memory)
        results.append((contents(out), done.files, done.tensor_digests))
    assert all(result == results[0] for result in results)


def test_every_tensor_starts_where_its_dtype_wants(source, out):
    write_checkpoint(fan_out(source), out)
    (out / "config.json").write_text("{}")
    with open_checkpoint(out) as written:
        sizes = [np.empty(0, written.read(name).dtype).itemsize for name in written.tensors]
        assert sizes == sorted(sizes, reverse=True)
        assert all(written.extent(n).offset % size == 0 for n, size in zip(written.tensors, sizes, strict=True))
        same = [n for n in written.tensors if n.startswith("e0.") and written.tensors[n].dtype == "BF16"]
        assert same == ["e0.model.embed.weight", "e0.model.layers.0.up.weight"], "order of the ops is not kept"


class Stop(Exception):
    pass


@pytest.mark.parametrize("seed", range(12))
def test_an_interrupted_run_continues_to_the_same_bytes(source, tmp_path, seed):
    whole = tmp_path / "whole"
    whole.mkdir()
    expected = write_checkpoint(fan_out(source), whole, max_shard_bytes=150)
    out, journal, dice = tmp_path / "out", Journal(), random.Random(seed)
    out.mkdir()
    kept = 0
    for _ in range(20):
        left = dice.randrange(1, 40)

        def check():
            nonlocal left
            left -= 1
            if left < 0:
                raise Stop

        try:
            done = write_checkpoint(
                fan_out(source), out, max_shard_bytes=150, workers=dice.choice([1, 2, 4]), journal=journal, check=check
            )
            break
        except Stop:
            names = dice.sample(sorted(journal.finished), min(len(journal.finished), 3))
            kept = max(kept, len(journal.finished))
            if dice.random() < 0.4 and names:  # a bit flips on disk after the file was journaled
                path = out / names[0]
                data = bytearray(path.read_bytes())
                data[dice.randrange(len(data))] ^= 1
                path.write_bytes(data)
    else:
        done = write_checkpoint(fan_out(source), out, max_shard_bytes=150, journal=journal)
    assert contents(out) == contents(whole)
    assert (done.files, done.tensor_digests) == (expected.files, expected.tensor_digests)
    assert set(journal.finished) == {n for n in expected.files if n.endswith(".safetensors")}


def test_finished_files_are_not_written_again(source, out):
    journal, ops = Journal(), fan_out(source)
    first = write_checkpoint(ops, out, max_shard_bytes=150, journal=journal)
    lost = sorted(journal.finished)[2]
    del journal.finished[lost]
    before = list(out.glob("*.safetensors"))
    for path in before:
        os.utime(path, (1, 1))
    counted = []
    computed = []
    watched = [
        TensorOp(
            op.outputs, op.inputs, op.compute and (lambda *a, op=op: computed.append(op) or op.compute(*a)), op.note
        )
        for op in ops
    ]
    again = write_checkpoint(watched, out, max_shard_bytes=150, journal=journal, on_bytes=counted.append)
    assert again.files == first.files
    assert {path.name for path in before if path.stat().st_mtime != 1} == {lost}
    lost_names = set(safetensors_digest(out / lost)[1])
    assert len(computed) == sum(bool(op.compute) and bool(lost_names & {i.name for i in op.outputs}) for op in ops)
    assert again.bytes_kept == sum(path.stat().st_size for path in before) - (out / lost).stat().st_size
    assert sum(counted) == sum(info.nbytes for op in ops for info in op.outputs)


def test_progress_adds_up_and_comes_from_the_calling_thread(source, out):
    counted, threads = [], set()

    def on_bytes(count):
        counted.append(count)
        threads.add(threading.get_ident())

    write_checkpoint(fan_out(source), out, on_bytes=on_bytes, check=lambda: threads.add(threading.get_ident()))
    assert sum(counted) == sum(info.nbytes for op in fan_out(source) for info in op.outputs)
    assert threads == {threading.get_ident()}


def test_a_failing_op_stops_the_others_and_is_the_error_raised(source, out):
    started = []

    def slow(i):
        started.append(i)
        if i == 3:
            raise ZeroDivisionError("in op 3")
        return np.zeros((5,), np.float32)

    ops = [TensorOp((TensorInfo(f"t{i}", "F32", (5,)),), (), lambda i=i: slow(i)) for i in range(400)]
    journal = Journal()
    with pytest.raises(ZeroDivisionError, match="op 3"):
        write_checkpoint(ops, out, workers=2, journal=journal)
    assert len(started) < 50
    assert not journal.finished
    assert not any(thread.name.startswith("ThreadPool") for thread in threading.enumerate())


def test_a_long_copy_stops_when_another_op_fails(source, out, monkeypatch):
    monkeypatch.setattr(feed_module, "_ROWS_BYTES", 10)
    monkeypatch.setattr(type(source), "extent", lambda *_: None)
    read, reading, reads = type(source).read, threading.Event(), []

    def slow(self, name, rows=None):
        reads.append(rows)
        reading.set()
        time.sleep(0.05)
        return read(self, name, rows)

    def fail():
        assert reading.wait(10)
        raise ZeroDivisionError

    monkeypatch.setattr(type(source), "read", slow)
    long = TensorOp((TensorInfo("long", "BF16", (13, 5)),), (Input(source, "model.embed.weight"),))
    with pytest.raises(ZeroDivisionError):
        write_checkpoint([long, TensorOp((TensorInfo("t", "U8", (1,)),), (), fail)], out, workers=2)
    assert len(reads) < 13


def test_memory_of_a_finished_op_is_free_for_the_next(out):
    meet = threading.Barrier(2, timeout=20)

    def together():
        meet.wait()
        return np.zeros(10, np.uint8)

    first = TensorOp((TensorInfo("large", "U8", (1000,)),), (), lambda: np.zeros(1000, np.uint8))
    pair = [TensorOp((TensorInfo(f"t{i}", "U8", (10,)),), (), together) for i in range(2)]
    write_checkpoint([first, *pair], out, workers=2, max_memory=1000)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (np.zeros((2, 3), np.float32), r"'t' \(halved\): planned BF16 \[2, 3\], computed F32 \[2, 3\]"),
        (np.zeros((3, 2), BF16), r"computed BF16 \[3, 2\]"),
        ([np.zeros((2, 3), BF16)] * 2, r"2 arrays computed for 1 outputs"),
        ([], r"0 arrays computed for 1"),
        (np.zeros((2, 3), ">f4"), r"computed >f4"),
    ],
)
def test_an_op_that_computes_something_else_is_refused(out, made, said):
    with pytest.raises(MoeforgeError, match=said):
        write_checkpoint([TensorOp((TensorInfo("t", "BF16", (2, 3)),), (), lambda: made, "halved")], out)


def test_arrays_of_any_memory_layout_are_written_row_major(out):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    views = {"t": base.T, "s": base[::2, ::-1], "f": np.asfortranarray(base)}
    write_checkpoint([TensorOp((TensorInfo(n, "F32", v.shape),), (), lambda v=v: v) for n, v in views.items()], out)
    found = tensors(out)
    assert {n: found[n][2] for n in views} == {n: v.tobytes() for n, v in views.items()}


@pytest.mark.parametrize("shape", [(5, 13), (13, 4), (65,)])
def test_a_copy_into_another_shape_or_dtype_is_refused_before_anything_is_written(source, out, shape):
    op = TensorOp((TensorInfo("t", "BF16", shape),), (Input(source, "model.embed.weight"),))
    with pytest.raises(BadInput, match=r"'t' is planned as BF16 .* is BF16 \[13, 5\]"):
        write_checkpoint([op], out)
    with pytest.raises(BadInput, match="is BF16"):
        write_checkpoint([TensorOp((TensorInfo("t", "F16", (13, 5)),), op.inputs)], out)
    assert contents(out) == {}


def test_two_outputs_of_one_name_are_refused(source, out):
    op = TensorOp((TensorInfo("t", "BF16", (13, 5)),), (Input(source, "model.embed.weight"),))
    with pytest.raises(BadInput, match="two tensors called 't'"):
        write_checkpoint([op, op], out)
    assert contents(out) == {}


def test_a_disk_without_room_is_said_before_anything_is_written(source, out, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(writer_module.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(MachineLacks, match=r"GB are to be written but the disk has 0\.000 GB free"):
        write_checkpoint(fan_out(source, 30), out)
    assert contents(out) == {}


def test_a_source_that_is_cut_while_it_is_copied_is_named(source, out, tmp_path):
    victim = sorted((tmp_path / "source").glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(BadInput, match=r"00002-of-00002\.safetensors: tensor '.*': ends at byte .* it was cut"):
        write_checkpoint(fan_out(source), out)


def test_memory_in_flight_stays_below_the_bound(out):
    size, bound = 4 * MB, 40 * MB
    flying, peak, lock = 0, 0, threading.Lock()

    def make():
        nonlocal flying, peak
        with lock:
            flying += size
            peak = max(peak, flying)
        made = np.ones(size, np.uint8)
        with lock:
            flying -= size
        return made

    ops = [TensorOp((TensorInfo(f"t{i}", "U8", (size,)),), (), make) for i in range(12)]
    write_checkpoint(ops, out, workers=4, max_memory=1)
    assert peak == size, "ops above the bound must run alone"
    peak = 0
    write_checkpoint(ops, out, workers=8, max_memory=bound)
    assert peak <= bound


def test_a_copy_without_an_extent_is_read_some_rows_at_a_time(source, out, monkeypatch):
    monkeypatch.setattr(feed_module, "_ROWS_BYTES", 30)
    monkeypatch.setattr(type(source), "extent", lambda *_: None)
    asked = []
    read = type(source).read
    monkeypatch.setattr(
        type(source), "read", lambda self, name, rows=None: asked.append((name, rows)) or read(self, name, rows)
    )
    ops = [
        TensorOp((TensorInfo(name, i.dtype, i.shape),), (Input(source, name),)) for name, i in source.tensors.items()
    ]
    ops.append(TensorOp((TensorInfo("rows", "BF16", (9, 5)),), (Input(source, "model.embed.weight", slice(-10, -1)),)))
    write_checkpoint(ops, out, workers=1)
    found = tensors(out)
    assert {n: found[n][2] for n in source.tensors} == {n: read(source, n).tobytes() for n in source.tensors}
    assert found["rows"][2] == read(source, "model.embed.weight")[3:12].tobytes()
    assert sum(name == "model.embed.weight" for name, _ in asked) == 5 + 3


@pytest.mark.parametrize("max_shard", [1, 7, 8, 16, 100])
def test_shards_hold_what_fits(max_shard):
    infos = [TensorInfo(f"t{i}", "U8", (size,)) for i, size in enumerate([3, 5, 8, 1, 0, 20, 2, 2])]
    shards = plan_shards(infos, max_shard)
    assert [i for s in shards for i in s.tensors] == infos
    for shard, after in zip(shards, [*shards[1:], None], strict=True):
        used = sum(i.nbytes for i in shard.tensors)
        assert used <= max_shard or len([i for i in shard.tensors if i.nbytes]) == 1
        assert after is None or used + after.tensors[0].nbytes > max_shard
    names = [s.name for s in shards]
    count = len(shards)
    assert names == (
        ["model.safetensors"]
        if count == 1
        else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    )


def test_nothing_to_write_is_an_error(out):
    with pytest.raises(BadInput, match="no tensors"):
        write_checkpoint([], out)
