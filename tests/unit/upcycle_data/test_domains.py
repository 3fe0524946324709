import pytest

from moeforge.errors import BadInput, UsageProblem
from moeforge_upcycle import domains


def encode(text: str) -> list[int]:
    return [1, *(ord(c) % 50 + 2 for c in text)]


def test_files_are_domains(tmp_path):
    (tmp_path / "law.txt").write_text("whereas the party of the first part")
    (tmp_path / "code.txt").write_text("def f(): return 1", "utf-8")
    found = domains.load([str(tmp_path / "law.txt"), str(tmp_path / "code.txt")])
    assert [d.text for d in found] == ["whereas the party of the first part", "def f(): return 1"]
    assert found[0].digest.startswith("sha256:") and found[0].digest != found[1].digest


def test_every_python_has_text():
    prose, code = domains.load([])
    assert [prose.name, code.name] == ["builtin:prose", "builtin:code"]
    assert len(prose.text) > 200_000 and "def " in code.text and prose.text != code.text
    assert domains.load(["builtin:code"])[0].digest == code.digest


def test_refusals(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    for source, told in [
        (str(tmp_path / "absent"), "No such file"),
        (str(tmp_path / "image.png"), "not UTF-8.*byte 0"),
        (str(tmp_path), "directory"),
        ("builtin:law", "builtin:legal"),
    ]:
        with pytest.raises(UsageProblem, match=told):
            domains.load([source])
    with pytest.raises(UsageProblem, match="twice"):
        domains.load(["builtin:prose", "builtin:prose"])


def test_sequences_cover_the_text_without_padding():
    text = "".join(chr(97 + i // 400) for i in range(10_000))
    found = domains.Domain("x", text).sequences(encode, tokens=100, length=20)
    assert [len(ids) for ids in found] == [20] * 5
    assert all(ids[0] == 1 for ids in found)
    assert len({ids[1] for ids in found}) == 5  # five places
    assert found[0][1] == encode("a")[1] and found == domains.Domain("y", text).sequences(encode, 100, 20)


def test_short_text_is_read_once():
    assert domains.Domain("x", "abc").sequences(encode, tokens=100, length=20) == [encode("abc")]
    with pytest.raises(BadInput, match="x is shorter"):
        domains.Domain("x", "").sequences(encode, tokens=100, length=20)


def test_prompts(tmp_path):
    file = tmp_path / "prompts.toml"
    file.write_text(
        '[[expert]]\npositive = ["solve", "prove"]\nnegative = ["poem"]\n[[expert]]\npositive = ["rhyme"]\n'
    )
    assert domains.read_prompts(file) == [
        domains.Prompts(("solve", "prove"), ("poem",)),
        domains.Prompts(("rhyme",), ()),
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "expected"),
        ("[[expert]]\nnegative = ['a']", "expert 0 has no positive"),
        ("[[expert]]\npositive = []", "expert 0 has no positive"),
        ("[[expert]]\npositive = 'a'", "expert 0: positive is not a list"),
        ("[[expert]]\npositive = ['  ']", "not a list of texts"),
        ("[[expert]]\npositive = ['a']\nweight = 2", "'weight'"),
        ("[[experts]]\npositive = ['a']", "experts"),
        ("[[expert]", "not valid TOML"),
    ],
)
def test_broken_prompts_are_named(tmp_path, text, told):
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(UsageProblem, match=told):
        domains.read_prompts(tmp_path / "p.toml")
    with pytest.raises(UsageProblem, match="No such file"):
        domains.read_prompts(tmp_path / "absent.toml")
