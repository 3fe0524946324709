"""Ways in which a downloaded checkpoint directory is broken or hostile, each to be refused in one line.

    for name, damage in damages().items():
        shutil.copytree(sound, broken)
        damage(broken)
        ...

A damage takes any sound directory of safetensors, in one file or in shards.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Damage = Callable[[Path], None]
INDEX = "model.safetensors.index.json"


def damages() -> dict[str, Damage]:
    """name -> function that breaks the directory it is given."""
    return {function.__name__.strip("_"): function for function in _ALL}


def _victim(directory: Path) -> Path:
    return sorted(directory.glob("*.safetensors"))[0]


def _split(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _join(path: Path, header: bytes, body: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)


def _edit(directory: Path, change: Callable[[dict[str, Any], str], None]) -> None:
    """Let `change(header, name of the second tensor)` edit the first file's header."""
    path = _victim(directory)
    header, body = _split(path)
    names = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    change(header, next(n for n in names[1:] if header[n]["data_offsets"][0] < header[n]["data_offsets"][1]))
    _join(path, json.dumps(header).encode(), body)


def _set(key: str, value: Any) -> Damage:
    return lambda directory: _edit(directory, lambda header, name: header[name].update({key: value}))


def _shift(begin: int, end: int) -> Damage:
    def change(header: dict[str, Any], name: str) -> None:
        offsets = header[name]["data_offsets"]
        header[name]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]

    return lambda directory: _edit(directory, change)


def _indexed(directory: Path) -> dict[str, Any]:
    """The index, made first where the directory has a single file."""
    path = directory / INDEX
    if not path.exists():
        single = _victim(directory)
        shard = single.rename(directory / "model-00001-of-00001.safetensors")
        path.write_text(json.dumps({"weight_map": {n: shard.name for n in _split(shard)[0] if n != "__metadata__"}}))
    return json.loads(path.read_text())


def _edit_index(directory: Path, change: Callable[[dict[str, str], str], None]) -> None:
    """Let `change(weight_map, name of a tensor)` edit the index."""
    index = _indexed(directory)
    change(index["weight_map"], sorted(index["weight_map"])[0])
    (directory / INDEX).write_text(json.dumps(index))


def _place(file: str) -> Damage:
    return lambda directory: _edit_index(directory, lambda placed, name: placed.update({name: file}))


def empty_file(directory: Path) -> None:
    _victim(directory).write_bytes(b"")


def only_five_bytes(directory: Path) -> None:
    _victim(directory).write_bytes(b"\x08\0\0\0\0")


def header_longer_than_file(directory: Path) -> None:
    path = _victim(directory)
    path.write_bytes(struct.pack("<Q", path.stat().st_size) + path.read_bytes()[8:])


def header_length_of_2_to_63(directory: Path) -> None:
    path = _victim(directory)
    path.write_bytes(struct.pack("<Q", 2**63) + path.read_bytes()[8:])


def header_above_the_limit(directory: Path) -> None:
    path = _victim(directory)
    path.write_bytes(struct.pack("<Q", 100_000_001) + path.read_bytes()[8:])
    os.truncate(path, 200_000_000)  # sparse: costs no disk


def header_not_utf8(directory: Path) -> None:
    _join(_victim(directory), b'{"\xff\xfe": {}}', b"")


def header_not_json(directory: Path) -> None:
    path = _victim(directory)
    _join(path, b"{'single': quotes}", _split(path)[1])


def header_a_list(directory: Path) -> None:
    path = _victim(directory)
    _join(path, b"[]", _split(path)[1])


def header_nested_deeply(directory: Path) -> None:
    _join(_victim(directory), b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"")


def header_with_nan(directory: Path) -> None:
    path = _victim(directory)
    _join(path, b'{"a": NaN}', _split(path)[1])


def metadata_not_text(directory: Path) -> None:
    _edit(directory, lambda header, _: header.update({"__metadata__": {"format": 1}}))


def tensor_listed_twice(directory: Path) -> None:
    path = _victim(directory)
    header, body = _split(path)
    text = json.dumps(header)
    name = next(n for n in header if n != "__metadata__")
    _join(path, (text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}").encode(), body)


def tensor_name_with_line_break(directory: Path) -> None:
    _edit(directory, lambda header, name: header.update({"a\nb\x1b[2J": header.pop(name)}))


def tensor_not_an_object(directory: Path) -> None:
    _edit(directory, lambda header, name: header.update({name: [1, 2]}))


def no_offsets(directory: Path) -> None:
    _edit(directory, lambda header, name: header[name].pop("data_offsets"))


def data_cut(directory: Path) -> None:
    path = _victim(directory)
    os.truncate(path, path.stat().st_size - 1)


def trailing_bytes(directory: Path) -> None:
    with open(_victim(directory), "ab") as file:
        file.write(b"\0" * 16)


def _move(directory: Path, by: int) -> None:
    """Move the second tensor and all after it by `by` bytes, and the end of the file with them."""
    path = _victim(directory)
    header, body = _split(path)
    spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    at = sorted(span[0] for span in spans if span[0] and span[1] > span[0])[0]
    for span in spans:
        if span[0] >= at:
            span[:] = [span[0] + by, span[1] + by]
    _join(path, json.dumps(header).encode(), body[:at] + b"\0" * by + body[at - min(by, 0) :])


def bytes_between_tensors(directory: Path) -> None:
    _move(directory, 8)


def tensors_share_bytes(directory: Path) -> None:
    _move(directory, -2)


def shape_overflows_behind_a_zero(directory: Path) -> None:
    def add(header: dict[str, Any], _: str) -> None:
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        header["none"] = {"dtype": "F32", "shape": [0, 2**62, 8], "data_offsets": [end, end]}

    _edit(directory, add)


def _append_dimension(value: Any) -> Damage:
    """A dimension that leaves the product as it is."""
    return lambda directory: _edit(directory, lambda header, name: header[name]["shape"].append(value))


def shape_disagrees_with_size(directory: Path) -> None:
    _edit(directory, lambda header, name: header[name]["shape"].append(2))


def index_not_json(directory: Path) -> None:
    _indexed(directory)
    (directory / INDEX).write_text("<html>404</html>")


def index_without_weight_map(directory: Path) -> None:
    _indexed(directory)
    (directory / INDEX).write_text('{"metadata": {}}')


def index_lists_a_tensor_twice(directory: Path) -> None:
    index = json.dumps(_indexed(directory)["weight_map"])
    name, file = next(iter(json.loads(index).items()))
    (directory / INDEX).write_text(f'{{"weight_map": {index[:-1]}, {json.dumps(name)}: {json.dumps(file)}}}}}')


def index_lists_too_little(directory: Path) -> None:
    _edit_index(directory, dict.__delitem__)


def index_lists_a_tensor_no_shard_has(directory: Path) -> None:
    _edit_index(directory, lambda placed, name: placed.update({"ghost.weight": placed[name]}))


def index_gives_a_number(directory: Path) -> None:
    _edit_index(directory, lambda placed, name: placed.update({name: 7}))  # type: ignore[dict-item]


def tensor_in_two_shards(directory: Path) -> None:
    index = _indexed(directory)
    victim = _victim(directory)
    (directory / "zz.safetensors").write_bytes(victim.read_bytes())
    name = next(n for n, file in index["weight_map"].items() if file == victim.name)
    _edit_index(directory, lambda placed, _: placed.update({name: "zz.safetensors"}))


def index_places_a_tensor_in_another_shard(directory: Path) -> None:
    _indexed(directory)
    entry = {"extra": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    _join(directory / "zz.safetensors", json.dumps(entry).encode(), b"0")
    _edit_index(directory, lambda placed, name: placed.update({"extra": "zz.safetensors", name: "zz.safetensors"}))


def shard_missing(directory: Path) -> None:
    _indexed(directory)
    _victim(directory).unlink()


def shard_a_directory(directory: Path) -> None:
    shard_missing(directory)
    name = sorted(set(_indexed_files(directory)))[0]
    (directory / name).mkdir()


def shard_a_link_that_leads_out(directory: Path) -> None:
    _indexed(directory)
    victim = _victim(directory)
    victim.symlink_to(victim.rename(directory.parent / f"{directory.name}-outside.safetensors"))


def shard_a_pipe(directory: Path) -> None:
    _indexed(directory)
    victim = _victim(directory)
    victim.unlink()
    os.mkfifo(victim)  # a reader that opens it waits for ever


def _indexed_files(directory: Path) -> list[str]:
    return list(json.loads((directory / INDEX).read_text())["weight_map"].values())


def config_missing(directory: Path) -> None:
    (directory / "config.json").unlink()


def config_not_json(directory: Path) -> None:
    (directory / "config.json").write_text("{'model_type': 'llama'}")


def config_not_an_object(directory: Path) -> None:
    (directory / "config.json").write_text("[1, 2]")


def no_weights(directory: Path) -> None:
    for path in [*directory.glob("*.safetensors"), *directory.glob("*.index.json")]:
        path.unlink()


def only_pickled_weights(directory: Path) -> None:
    no_weights(directory)
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x02cposix\nsystem\n(S'touch /tmp/unpickled'\ntR.")


def shape_of_many_dimensions(directory: Path) -> None:
    for _ in range(40):
        _append_dimension(1)(directory)


def _named(name: str, damage: Damage) -> Damage:
    damage.__name__ = name
    return damage


_ALL: list[Damage] = [
    empty_file, only_five_bytes, header_longer_than_file, header_length_of_2_to_63, header_above_the_limit, header_not_utf8,
    header_not_json, header_a_list, header_nested_deeply, header_with_nan, metadata_not_text, tensor_listed_twice,
    tensor_name_with_line_break, tensor_not_an_object, no_offsets, data_cut, trailing_bytes, shape_disagrees_with_size,
    bytes_between_tensors, tensors_share_bytes, shape_overflows_behind_a_zero,
    _named("dtype_unknown", _set("dtype", "F7")),
    _named("dtype_a_number", _set("dtype", 16)),
    _named("shape_negative", _set("shape", [-1, -4])),
    _named("shape_overflows", _set("shape", [2**62, 8])),
    _named("shape_a_boolean", _append_dimension(True)),
    _named("shape_a_fraction", _append_dimension(1.0)),
    shape_of_many_dimensions,
    _named("offsets_overlap", _shift(-4, 0)),
    _named("offsets_leave_a_gap", _shift(4, 0)),
    _named("offsets_beyond_the_file", _shift(0, 2**40)),
    _named("offsets_reversed", _set("data_offsets", [64, 8])),
    _named("offsets_negative", _set("data_offsets", [-8, 8])),
    _named("offsets_of_2_to_64", _set("data_offsets", [0, 2**64])),
    index_not_json, index_without_weight_map, index_lists_a_tensor_twice, index_lists_too_little,
    index_lists_a_tensor_no_shard_has, index_gives_a_number,
    _named("index_leads_out_by_parent", _place("../secret.safetensors")),
    _named("index_leads_out_by_root", _place("/etc/secret.safetensors")),
    _named("index_names_another_kind_of_file", _place("config.json")),
    index_places_a_tensor_in_another_shard, tensor_in_two_shards, shard_missing, shard_a_directory, shard_a_link_that_leads_out, shard_a_pipe,
    config_missing, config_not_json, config_not_an_object, no_weights, only_pickled_weights,
]  # fmt: skip
