"""What documents are about: by source, by field, by name."""

import json

import pytest

from moeforge.errors import BadInput, UsageProblem
from moeforge.train.data import find_pools, hold_out_pools
from moeforge.train.labels import check_route, labels_of, name_labels, number_labels


@pytest.fixture
def files(tmp_path):
    def write(name, labels):
        path = tmp_path / name
        path.write_text(
            "".join(json.dumps({"text": f"{name} {i}", "about": label}) + "\n" for i, label in enumerate(labels))
        )
        return str(path)

    return write


def labels(pools):
    return [[d.label for d in pool.documents] for pool in pools]


def test_sources_are_numbered_with_and_without_weights(files, tmp_path):
    one, two = files("a.jsonl", "xy"), files("b.jsonl", "z")
    (tmp_path / "lone.txt").write_text("long enough to be cut\n\n" * 300)
    assert labels(find_pools([one, two])) == [[0, 0, 1]]
    assert labels(find_pools([f"{two}=2", f"{one}=1"])) == [[0], [1, 1]]
    train, held = hold_out_pools(find_pools([f"{one}=1", f"{tmp_path / 'lone.txt'}=1"]), 0.3, 0)
    assert {d.label for d in train[1].documents} == {1} and {d.label for d in held} == {0, 1}


def test_a_field_of_words_or_numbers(files):
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    words = find_pools([files("a.jsonl", ["wine", "code", "wine"])], "about")
    assert name_labels(words) == ["code", "wine"] and labels(number_labels(words, ["code", "wine"])) == [[1, 0, 1]]
    assert name_labels(words, ["law", "wine", "code"]) == ["law", "wine", "code"]
    assert name_labels(words, ["law", "wine"]) == ["code", "wine"]
    path = files("b.jsonl", []).replace(".jsonl", ".parquet")
    pq.write_table(pa.table({"text": ["m", "n"], "about": [2, 0]}), path)
    numbers = number_labels(find_pools([path], "about"), name_labels(find_pools([path], "about")))
    assert labels(numbers) == [[2, 0]] and labels_of(numbers) == 3


@pytest.mark.parametrize(("found", "message"), [
    ([1, "a"], "its label is 1, others are words such as 'a'"), ([0, -1], "its label is -1; labels are numbers from 0"),
    ([0, None], "found None"), ([0, 1.5], r"found 1\.5"), ([0, True], "found True"),
])  # fmt: skip
def test_labels_that_are_none(files, found, message):
    with pytest.raises(BadInput, match=message):
        pools = find_pools([files("a.jsonl", found)], "about")
        number_labels(pools, name_labels(pools))


def entry(count, **router):
    return {"site": "q", "layers": [3], "experts": {"count": count}, "router": router}


@pytest.mark.parametrize(("entries", "route", "message"), [
    ([entry(4, kind="linear"), entry(2, kind="linear")], "label", "3 labels .* 2 experts at q of layer 3"),
    ([entry(2, kind="label")], "config", "3 labels .* 2 experts"),
    ([entry(3, kind="label")], "all", "choose by label and have no scores"),
    ([entry(1, kind="always")], "label", "no routers"),
])  # fmt: skip
def test_routes_that_are_not_there(entries, route, message):
    with pytest.raises(UsageProblem, match=message):
        check_route({"mixtures": entries}, route, 3, "x")


def test_routes_that_are_there():
    check_route({"mixtures": [entry(3, kind="linear"), entry(1, kind="always")]}, "label", 3, "x")
    check_route({"mixtures": [entry(2, kind="linear")]}, "config", 3, "x")
    check_route({}, "config", 3, "x")
