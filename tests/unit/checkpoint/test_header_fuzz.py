"""The header parser on arbitrary and on nearly sound headers: it accepts only what the reference library accepts too,
and never lets a tensor lie outside its file."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from moeforge.checkpoint.digest import safetensors_digest
from moeforge.checkpoint.safetensors import encode_header, parse_header, read_header
from moeforge.checkpoint.tensor import NUMPY_DTYPES, TensorInfo
from moeforge.errors import BadInput

COMMON = settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NUMBERS = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, 2**70, -(2**63)]),
    st.floats(),
    st.booleans(),
    st.none(),
)
DTYPES = st.one_of(
    st.sampled_from(sorted(NUMPY_DTYPES)), st.sampled_from(["F4", "f32", "", "BF16 "]), st.integers(), st.none()
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": DTYPES,
        "shape": st.one_of(st.lists(NUMBERS, max_size=4), NUMBERS),
        "data_offsets": st.lists(NUMBERS, max_size=3),
    },
)
HEADERS = st.dictionaries(
    st.one_of(st.text(max_size=5), st.just("__metadata__")),
    st.one_of(ENTRY, NUMBERS, st.lists(NUMBERS, max_size=2)),
    max_size=4,
)


def framed(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def accepted(raw: bytes, size: int):
    """The header if it is accepted; checks that the refusal is one line and the acceptance keeps its promise."""
    try:
        header = parse_header(raw, size, "file")
    except BadInput as error:
        header, said = None, str(error)
    if header is None:
        assert said.isprintable() and len(said) < 2000
        return None
    end = len(raw)
    for name, info in header.tensors.items():
        assert header.offsets[name] == end
        end += info.nbytes
    assert end == size
    return header


@COMMON
@given(st.binary(max_size=200), st.integers(0, 400))
def test_any_bytes(data, extra):
    accepted(framed(data), 8 + len(data) + extra)


@COMMON
@given(HEADERS, st.integers(0, 80))
def test_any_json(body, extra):
    text = json.dumps(body).encode()
    accepted(framed(text), 8 + len(text) + extra)


@st.composite
def sound(draw):
    names = draw(
        st.lists(
            st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1, max_size=8),
            unique=True,
            min_size=1,
            max_size=5,
        )
    )
    return [
        TensorInfo(n, draw(st.sampled_from(sorted(NUMPY_DTYPES))), tuple(draw(st.lists(st.integers(0, 4), max_size=3))))
        for n in names
        if n != "__metadata__"
    ]


@COMMON
@given(sound())
def test_what_is_encoded_is_parsed_back(infos):
    raw = encode_header(infos, {"format": "pt"})
    header = accepted(raw, len(raw) + sum(i.nbytes for i in infos))
    assert header is not None and len(raw) % 8 == 0 and header.metadata == {"format": "pt"}
    assert sorted(header.tensors.values(), key=str) == sorted(infos, key=str)


@settings(COMMON, max_examples=100)
@given(sound(), st.data())
def test_one_changed_byte_is_refused_or_read_alike_by_the_reference_library(infos, data):
    raw = bytearray(encode_header(infos, None))
    size = len(raw) + sum(i.nbytes for i in infos)
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x.safetensors"
        path.write_bytes(bytes(raw) + bytes(size - len(raw)))
        try:
            header = read_header(path)
        except BadInput:
            return
        safetensors_digest(path)
        with safe_open(path, "np") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert found == {name: info.shape for name, info in header.tensors.items()}


def test_an_accepted_header_never_makes_an_array_larger_than_its_file():
    for shape in ([2**40], [2**62, 2], [0, 2**62], [2**31, 2**31]):
        text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
        header = accepted(framed(text), 8 + len(text))
        if header is not None:
            assert np.empty(header.tensors["a"].shape, np.float32).nbytes == 0
    with pytest.raises(BadInput):
        read_header(Path("/nowhere/at/all"))
