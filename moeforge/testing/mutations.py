"""Random damage to checkpoints, by kind and seed: what :mod:`moeforge.testing.campaign` feeds to the readers.

Each mutation changes one directory in place, guided by a `random.Random`; the fixed damages of :mod:`moeforge.testing.damage`
are one of the kinds.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from .damage import INDEX, damages

Mutation = Callable[[Random, Path], None]

SECRET = b"a secret of this machine: 6f1c27"
"""The content of files outside the directory; no reader may ever hand it out."""
NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 0.5, 1e308, -0.0, "", "x",
    "model", "../x", "/etc/passwd", "a\nb", "\x1b[2J", "x" * 5000, [], [[]], [1], [-1, 2], ["a"], {}, {"a": 1}, [2**62, 8],
)  # fmt: skip


def _header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _write(path: Path, header: dict[str, Any] | bytes, body: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def _weights(rng: Random, directory: Path) -> Path:
    return rng.choice(sorted(directory.glob("*.safetensors")))


def _entry(rng: Random, header: dict[str, Any]) -> str:
    return rng.choice(sorted(name for name in header if name != "__metadata__"))


def _flip(rng: Random, path: Path, limit: int) -> None:
    """Change up to eight of the first `limit` bytes."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(min(limit, len(data)))] = rng.randrange(256)
    path.write_bytes(data)


def header_bytes_changed(rng: Random, directory: Path) -> None:
    path = _weights(rng, directory)
    _flip(rng, path, 8 + struct.unpack("<Q", path.read_bytes()[:8])[0])


def file_cut(rng: Random, directory: Path) -> None:
    path = _weights(rng, directory)
    path.write_bytes(path.read_bytes()[: rng.choice([rng.randrange(64), rng.randrange(path.stat().st_size)])])


def header_cut(rng: Random, directory: Path) -> None:
    """The length is that of the shorter header: only the JSON is broken."""
    path = _weights(rng, directory)
    header, body = _header(path)
    text = json.dumps(header).encode()
    _write(path, text[: rng.randrange(len(text))], body)


def header_length_lies(rng: Random, directory: Path) -> None:
    path = _weights(rng, directory)
    length = rng.choice([rng.randrange(2**12), 2 ** rng.randrange(64), 2**64 - rng.randrange(1, 99)])
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])


def entry_changed(rng: Random, directory: Path) -> None:
    path = _weights(rng, directory)
    header, body = _header(path)
    entry = header[_entry(rng, header)]
    key = rng.choice(["dtype", "shape", "data_offsets", "other"])
    if key in ("shape", "data_offsets") and rng.random() < 0.6:
        entry[key][rng.randrange(len(entry[key]))] = rng.choice(NASTY)
    elif rng.random() < 0.1:
        entry.pop(key, None)
    else:
        entry[key] = rng.choice(NASTY)
    _write(path, header, body)


def offsets_moved(rng: Random, directory: Path) -> None:
    """Overlaps, gaps, ends beyond the file."""
    path = _weights(rng, directory)
    header, body = _header(path)
    for _ in range(rng.randint(1, 3)):
        span = header[_entry(rng, header)]["data_offsets"]
        span[rng.randrange(2)] += rng.choice([-4, 4, -64, 64, rng.randrange(-(2**20), 2**40)])
    _write(path, header, body)


def name_repeated(rng: Random, directory: Path) -> None:
    path = _weights(rng, directory)
    header, body = _header(path)
    first, second = _entry(rng, header), _entry(rng, header)
    text = json.dumps(header)[:-1] + f", {json.dumps(first)}: {json.dumps(header[second])}}}"
    _write(path, text.encode(), body)


def tensor_missing(rng: Random, directory: Path) -> None:
    path = _weights(rng, directory)
    header, body = _header(path)
    name = _entry(rng, header)
    begin, end = header.pop(name)["data_offsets"]
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [at - (end - begin) for at in entry["data_offsets"]]
    _write(path, header, body[:begin] + body[end:])
    _change_index(directory, lambda placed: placed.pop(name, None))


def tensor_left_over(rng: Random, directory: Path) -> None:
    path = _weights(rng, directory)
    header, body = _header(path)
    name = rng.choice(
        ["model.layers.9.mlp.up_proj.weight", "extra.weight", "model.layers.0.mlp.up_proj.bias", "x" * 999, ""]
    )
    header[name] = {"dtype": "F32", "shape": [2, 2], "data_offsets": [len(body), len(body) + 16]}
    _write(path, header, body + bytes(16))
    _change_index(directory, lambda placed: placed.update({name: path.name}))


def tensor_renamed(rng: Random, directory: Path) -> None:
    path = _weights(rng, directory)
    header, body = _header(path)
    old = _entry(rng, header)
    new = rng.choice(
        [old.replace("0", "1"), old[:-1], old.upper(), "../" + old, _entry(rng, header), old.replace("up", "gate")]
    )
    header[new] = header.pop(old)
    _write(path, header, body)
    _change_index(directory, lambda placed: placed.update({new: placed.pop(old, path.name)}))


def shape_wrong(rng: Random, directory: Path) -> None:
    """As many bytes in another shape: only the architecture can tell."""
    path = _weights(rng, directory)
    header, body = _header(path)
    entry = header[_entry(rng, header)]
    shape = entry["shape"]
    entry["shape"] = rng.choice([shape[::-1], [*shape, 1], [1, *shape], [*shape[:-2], -1 * -1], [8, 0], [sum(shape)]])
    if len(shape) == 2 and rng.random() < 0.5:
        entry["shape"] = [shape[0] * 2, shape[1] // 2]
    _write(path, header, body)


def dtype_wrong(rng: Random, directory: Path) -> None:
    """As many bytes of another type."""
    path = _weights(rng, directory)
    header, body = _header(path)
    entry = header[_entry(rng, header)]
    entry["dtype"] = rng.choice(["I32", "U32", "BF16", "F16", "F64", "I8", "F8_E4M3", "BOOL", "C64", "F4"])
    _write(path, header, body)


def weights_not_finite(rng: Random, directory: Path) -> None:
    """Nothing in the headers tells; only who reads the weights can refuse them."""
    path = _weights(rng, directory)
    header, body = _header(path)
    names = sorted(name for name in header if name != "__metadata__" and header[name]["dtype"] == "F32")
    begin, end = header[rng.choice(names)]["data_offsets"]
    at = begin + 4 * rng.randrange((end - begin) // 4)
    _write(path, header, body[:at] + struct.pack("<f", rng.choice([float("nan"), float("inf")])) + body[at + 4 :])


def _change_index(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / INDEX
    if path.exists():
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))


def index_changed(rng: Random, directory: Path) -> None:
    path = directory / INDEX
    if not path.exists():
        names = [name for name in _header(_weights(rng, directory))[0] if name != "__metadata__"]
        path.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
        (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    where = rng.choice([
        "../outside.safetensors", "/etc/passwd", "..", "config.json", "no.safetensors", "a/b.safetensors", ".safetensors",
        "model-00001-of-00001.safetensors", "x\0.safetensors", rng.choice(NASTY),
    ])  # fmt: skip
    if rng.random() < 0.3:
        _flip(rng, path, path.stat().st_size)
        return
    index = json.loads(path.read_text())
    if rng.random() < 0.2:
        index["weight_map"] = rng.choice(NASTY)
    else:
        index["weight_map"][rng.choice(["extra", *index["weight_map"]])] = where
    path.write_text(json.dumps(index))


def link_out(rng: Random, directory: Path) -> None:
    """A file that is a link to one of the same name outside, which holds a secret or is sound itself."""
    name = rng.choice(
        [path.name for path in directory.iterdir()] + ["tokenizer.json", "LICENSE", "chat_template.jinja"]
    )
    path, outside = directory / name, directory.parent / f"{directory.name}-outside-{name}"
    sound = path.read_bytes() if path.exists() else b""
    outside.write_bytes(sound if rng.random() < 0.5 and sound else SECRET)
    path.unlink(missing_ok=True)
    path.symlink_to(rng.choice([outside, Path("..") / outside.name, Path("/dev/zero"), Path("."), path]))


def _change_json(rng: Random, path: Path) -> None:
    if rng.random() < 0.2:
        _flip(rng, path, path.stat().st_size)
        return
    body = json.loads(path.read_text())
    for _ in range(rng.randint(1, 2)):
        place: Any = body
        while inner := [value for _, value in _items(place) if isinstance(value, dict | list) and value]:
            if rng.random() < 0.3:
                break
            place = rng.choice(inner)
        key, value = rng.choice(_items(place) or [("x", None)])
        if rng.random() < 0.2:
            place.pop(key)
        elif isinstance(value, int) and rng.random() < 0.4:
            place[key] = rng.choice([value + 1, value - 1, value * 2, -value, value * 10**9])
        else:
            place[key] = rng.choice(NASTY)
    path.write_text(json.dumps(body))


def _items(place: Any) -> list[tuple[Any, Any]]:
    """(key or position, value) of a JSON object or list."""
    return sorted(place.items()) if isinstance(place, dict) else list(enumerate(place))


def config_changed(rng: Random, directory: Path) -> None:
    _change_json(rng, directory / "config.json")


def adapter_config_changed(rng: Random, directory: Path) -> None:
    _change_json(rng, directory / "adapter_config.json")


def manifest_changed(rng: Random, directory: Path) -> None:
    _change_json(rng, directory / "moeforge.json")


def gguf_bytes_changed(rng: Random, directory: Path) -> None:
    _flip(rng, next(directory.glob("*.gguf")), rng.choice([64, 400, 4000]))


def gguf_cut(rng: Random, directory: Path) -> None:
    path = next(directory.glob("*.gguf"))
    path.write_bytes(path.read_bytes()[: rng.choice([rng.randrange(100), rng.randrange(path.stat().st_size)])])


def gguf_number_huge(rng: Random, directory: Path) -> None:
    """A count, length or offset somewhere in the header becomes huge."""
    path = next(directory.glob("*.gguf"))
    data = bytearray(path.read_bytes())
    at = rng.choice([8, 16, 24, rng.randrange(24, min(4000, len(data) - 8))])
    data[at : at + 8] = struct.pack("<Q", rng.choice([2**63, 2**64 - 1, 2**40, 2**32 - 1, len(data)]))
    path.write_bytes(data)


def fixed_damage(rng: Random, directory: Path) -> None:
    names = sorted(damages())
    damages()[rng.choice(names)](directory)


HEADERS: tuple[Mutation, ...] = (
    header_bytes_changed, file_cut, header_cut, header_length_lies, entry_changed, offsets_moved, name_repeated, tensor_missing,
    tensor_left_over, tensor_renamed, shape_wrong, dtype_wrong,
)  # fmt: skip
"""For whatever lies in safetensors."""
