"""Where documents come from, and what is refused."""

import json

import pytest

from moeforge.errors import BadInput, UsageProblem
from moeforge.train.data import find_documents, find_pools, hold_out, hold_out_pools


def test_a_directory_is_read_by_name_hidden_files_and_others_left_out(tmp_path):
    (tmp_path / "b.md").write_text("bee")
    (tmp_path / "a.txt").write_text("ay")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.py").write_text("see = 3")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("no")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert [d.read() for d in find_documents([str(tmp_path)])] == ["ay", "bee", "see = 3"]


def test_jsonl_holds_text_or_messages(tmp_path):
    messages = [{"role": "user", "content": "häh?"}, {"role": "assistant", "content": "so"}]
    lines = [
        json.dumps({"text": "first ü"}),
        "",
        json.dumps({"messages": messages}, ensure_ascii=False),
        json.dumps({"text": "last"}),
    ]
    file = tmp_path / "d.jsonl"
    file.write_text("\n".join(lines), "utf-8")
    found = find_documents([str(file)])
    # in any order: each knows its own place in the file
    assert [d.read() for d in reversed(found)] == ["last", messages, "first ü"]
    assert [d.key for d in found] == [f"{file}:1", f"{file}:3", f"{file}:4"]


@pytest.mark.parametrize(
    "line",
    ['{"text": ', '{"body": "x"}', '["x"]', '{"text": 3}', '{"messages": [{"role": "user"}]}', '{"messages": []}'],
)
def test_a_bad_record_names_its_line(tmp_path, line):
    file = tmp_path / "d.jsonl"
    file.write_text('{"text": "ok"}\n' + line + "\n")
    bad = find_documents([str(file)])[1]
    with pytest.raises(BadInput, match=r"d\.jsonl:2"):
        bad.read()


def test_unknown_sources_are_refused_with_what_would_do(tmp_path):
    with pytest.raises(UsageProblem, match="no such file"):
        find_documents([str(tmp_path / "nope.txt")])
    (tmp_path / "x.docx").write_text("x")
    with pytest.raises(UsageProblem, match=r"\.docx is not a kind"):
        find_documents([str(tmp_path / "x.docx")])
    with pytest.raises(UsageProblem, match="did you mean 'builtin:prose'"):
        find_documents(["builtin:prosa"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no documents"):
        find_documents([str(tmp_path / "empty")])


@pytest.mark.parametrize("name", ["prose", "code"])
def test_built_in_text_is_real(name):
    found = find_documents([f"builtin:{name}"])
    assert len(found) > 50
    assert sum(len(d.read()) for d in found[:20]) > 20_000
    assert all(abs(len(d.read().encode()) - d.size) <= d.size for d in found[:20])


def test_held_out_documents_are_chosen_by_the_seed_and_disjoint(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"document {i}")
    documents = find_documents([str(tmp_path)])
    train, held = hold_out(documents, 0.1, seed=3)
    assert len(held) == 4
    assert {d.key for d in train}.isdisjoint(d.key for d in held)
    assert len(train) + len(held) == 40
    assert [d.key for d in hold_out(documents, 0.1, seed=3)[1]] == [d.key for d in held]
    assert [d.key for d in hold_out(documents, 0.1, seed=4)[1]] != [d.key for d in held]
    assert hold_out(documents, 0, seed=3) == (documents, [])
    assert len(hold_out(documents[:2], 0.9, seed=0)[0]) == 1


def test_a_lone_text_is_cut_at_paragraphs_and_a_lone_line_refused(tmp_path):
    file = tmp_path / "one.txt"
    text = "\n\n".join(f"paragraph {i} " + "word " * 200 for i in range(20))
    file.write_text(text)
    train, held = hold_out(find_documents([str(file)]), 0.2, seed=0)
    assert len(train) > 3
    assert len(held) >= 1
    assert sum(d.read().count("paragraph") for d in [*train, *held]) == 20
    file.write_text("short")
    with pytest.raises(UsageProblem, match="--held-out 0"):
        hold_out(find_documents([str(file)]), 0.2, seed=0)


def test_an_edited_file_has_another_identity(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text('{"text": "a"}\n')
    before = [d.identity for d in find_documents([str(file)])]
    file.write_text('{"text": "bb"}\n')
    assert [d.identity for d in find_documents([str(file)])] != before


def test_weights_make_pools(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name}{i}"}) + "\n" for i in range(10)))
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    (plain,) = find_pools([a, b])
    assert len(plain.documents) == 20
    one, other = find_pools([f"{a}=0.7", f"{b}=3e-1"])
    assert (one.weight, other.weight) == (0.7, 0.3)
    assert [d.read() for d in other.documents] == [f"b{i}" for i in range(10)]
    train, held = hold_out_pools([one, other], 0.2, seed=1)
    assert [(len(pool.documents), pool.weight) for pool in train] == [(8, 0.7), (8, 0.3)]
    assert sorted(d.read()[0] for d in held) == ["a", "a", "b", "b"]
    with pytest.raises(UsageProblem, match=r"b\.jsonl has no weight"):
        find_pools([f"{a}=1", b])
    for number in ("0", "-1", "nan", "inf"):
        with pytest.raises(UsageProblem, match="above 0"):
            find_pools([f"{a}={number}"])


def test_a_directory_whose_name_looks_like_a_weight_is_that_directory(tmp_path):
    (tmp_path / "x=0.5").mkdir()
    (tmp_path / "x=0.5" / "a.txt").write_text("odd")
    (pool,) = find_pools([str(tmp_path / "x=0.5")])
    assert [d.read() for d in pool.documents] == ["odd"] and pool.weight == 1


def test_text_that_is_not_utf8_is_refused_with_the_place(tmp_path):
    file = tmp_path / "old.txt"
    file.write_bytes("Straße\n".encode() + "caf\xe9\n".encode("latin1"))
    (document,) = find_documents([str(file)])
    with pytest.raises(BadInput, match=r"old\.txt: the byte 0xe9 at offset 11 is not UTF-8"):
        document.read()
