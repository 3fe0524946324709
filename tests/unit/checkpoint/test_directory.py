"""Reading directories: every tensor as the reference library wrote it, every damage refused."""

import os
import shutil
import tracemalloc

import pytest

from moeforge.checkpoint import open_checkpoint
from moeforge.errors import BadInput
from moeforge.testing.damage import damages


@pytest.mark.parametrize("shards", [1, 2, 9])
def test_every_tensor_is_read_as_it_was_written(state, save, raw, tmp_path, shards):
    with open_checkpoint(save(state, tmp_path / "src", shards)) as checkpoint:
        assert set(checkpoint.tensors) == set(state)
        for name, tensor in state.items():
            read = checkpoint.read(name)
            assert read.shape == tuple(tensor.shape) == checkpoint.tensors[name].shape
            assert read.tobytes() == raw(tensor), name
            extent = checkpoint.extent(name)
            assert extent.path.read_bytes()[extent.offset : extent.offset + extent.nbytes] == raw(tensor)


@pytest.mark.parametrize(
    "rows", [slice(1, 4), slice(0, 0), slice(5, None), slice(-3, -1), slice(6, 2), slice(None), slice(3, 99)]
)
def test_rows_are_those_of_a_python_slice(state, save, raw, tmp_path, rows):
    with open_checkpoint(save(state, tmp_path / "src")) as checkpoint:
        for name in ("model.embed.weight", "model.layers.1.codes", "model.layers.1.none", "model.layers.0.norm.weight"):
            read = checkpoint.read(name, rows)
            assert read.flags.c_contiguous and read.shape == tuple(state[name][rows].shape)
            assert read.tobytes() == raw(state[name][rows])


def test_what_has_no_rows_or_is_not_there_is_refused(state, save, tmp_path):
    with open_checkpoint(save(state, tmp_path / "src")) as checkpoint:
        for name, rows in [
            ("model.layers.1.scale", slice(0, 1)),
            ("model.embed.weight", slice(0, 9, 2)),
            ("ghost", None),
        ]:
            with pytest.raises(BadInput, match=name):
                checkpoint.read(name, rows)


def test_a_file_cut_after_it_was_opened_is_noticed(state, save, tmp_path):
    source = save(state, tmp_path / "src")
    with open_checkpoint(source) as checkpoint:
        last = list(checkpoint.tensors)[-1]
        os.truncate(source / "model.safetensors", os.path.getsize(source / "model.safetensors") - 1)
        with pytest.raises(BadInput, match=last):
            checkpoint.read(last)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", damages())
def test_damage_is_refused_in_one_line(state, save, tmp_path, name, shards):
    broken = save(state, tmp_path / "src", shards)
    open_checkpoint(broken).close()
    damages()[name](broken)
    tracemalloc.start()
    try:
        with pytest.raises(BadInput) as caught:
            open_checkpoint(broken)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500
    assert str(broken) in message
    assert any(word in message for word in (".safetensors", ".json", ".bin")), message
    assert peak < 5_000_000, "a hostile header decided how much was allocated"


def test_there_are_many_kinds_of_damage():
    assert len(damages()) >= 17


def test_the_cache_layout_of_the_hub_is_followed(state, save, tmp_path):
    """Snapshots hold links to ../../blobs."""
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = save(state, repo / "snapshots" / ("c" * 40), 2)
    (repo / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(repo / "blobs" / str(number))
        path.symlink_to(f"../../blobs/{number}")
    with open_checkpoint(snapshot) as checkpoint:
        assert checkpoint.read("model.embed.weight").shape == (13, 5)
        assert [c.name for c in checkpoint.companions()] == ["tokenizer.json"]
    elsewhere = save(state, tmp_path / "elsewhere") / "model.safetensors"
    path = sorted(snapshot.glob("*.safetensors"))[0]
    path.unlink()
    path.symlink_to(elsewhere)
    with pytest.raises(BadInput, match="leads out"):
        open_checkpoint(snapshot)


def test_links_within_the_directory_and_to_the_directory_are_followed(state, save, tmp_path):
    source = save(state, tmp_path / "src")
    (source / "files").mkdir()
    (source / "model.safetensors").rename(source / "files" / "w")
    (source / "model.safetensors").symlink_to("files/w")
    (tmp_path / "link").symlink_to(source)
    open_checkpoint(tmp_path / "link").close()


def test_a_companion_that_is_a_link_to_a_secret_is_refused(state, save, tmp_path):
    source = save(state, tmp_path / "src")
    (tmp_path / "secret").write_text("password")
    (source / "tokenizer_config.json").symlink_to(tmp_path / "secret")
    with open_checkpoint(source) as checkpoint, pytest.raises(BadInput, match=r"tokenizer_config\.json.*leads out"):
        checkpoint.companions()


def test_companions_are_what_a_model_needs_and_nothing_else(state, save, tmp_path):
    source = save(state, tmp_path / "src")
    wanted = ["LICENSE", "added_tokens.json", "chat_template.jinja", "generation_config.json", "merges.txt",
              "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
              "additional_chat_templates/tool.jinja"]  # fmt: skip
    (source / "additional_chat_templates").mkdir()
    for name in [
        *wanted,
        "README.md",
        "modeling_x.py",
        "tokenization_x.py",
        "tokenizer_x.py",
        "moeforge.json.bak",
        ".gitattributes",
        "run.log",
    ]:
        (source / name).write_text("{}")
    with open_checkpoint(source) as checkpoint:
        assert sorted(c.name for c in checkpoint.companions()) == sorted(wanted)
        assert all(c.read() == b"{}" for c in checkpoint.companions())


def test_provenance_follows_the_content_and_names_the_licence(state, save, tmp_path):
    source = save(state, tmp_path / "src")
    (source / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model\nlicense: wrong")
    (source / "moeforge.json").write_text('{"schema": 1, "kind": "checkpoint", "digest": "sha256:abc"}')

    def identity():
        with open_checkpoint(source) as checkpoint:
            return checkpoint.provenance()

    first = identity()
    assert (
        first["license"] == "apache-2.0"
        and first["manifest_digest"] == "sha256:abc"
        and first["format"] == "safetensors"
    )
    assert identity() == first
    os.utime(source / "model.safetensors", (1, 1))
    assert identity()["digest"] != first["digest"]
    second = identity()
    (source / "config.json").write_text('{"model_type": "test", "hidden_size": 6}')
    assert identity()["digest"] != second["digest"]


def test_a_lone_safetensors_file_of_another_name_is_found_and_two_are_not(state, save, tmp_path):
    source = save(state, tmp_path / "src")
    (source / "model.safetensors").rename(source / "weights.safetensors")
    open_checkpoint(source).close()
    shutil.copy(source / "weights.safetensors", source / "more.safetensors")
    with pytest.raises(BadInput, match=r"2 safetensors files .*index"):
        open_checkpoint(source)


@pytest.mark.parametrize("ref", ["nowhere", "a/b/c", "./org/name", "org/na me", "/no/such/dir", "", "~nobody/x"])
def test_what_is_neither_a_path_nor_a_hub_id_is_refused(ref, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(BadInput):
        open_checkpoint(ref)
    with pytest.raises(BadInput, match="not GGUF"):
        open_checkpoint(tmp_path / "file.txt")


def test_reading_after_close_is_an_error(state, save, tmp_path):
    checkpoint = open_checkpoint(save(state, tmp_path / "src"))
    checkpoint.read("model.embed.weight")
    checkpoint.close()
    with pytest.raises(ValueError, match="closed"):
        checkpoint.read("model.embed.weight")


@pytest.mark.parametrize("file", ["moeforge.json", "adapter_config.json", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("target", ["/dev/zero", "outside"])
def test_small_files_are_never_links_to_a_device_or_out(file, target, state, save, tmp_path):
    """A reader that follows the first would fill the memory."""
    from moeforge.pipeline.artifact import locate

    source = save(state, tmp_path / "src")
    (tmp_path / "outside").write_text("{}")
    (source / file).unlink(missing_ok=True)
    (source / file).symlink_to(tmp_path / target if target == "outside" else target)
    if file == "adapter_config.json":
        (source / "config.json").unlink()
    with (
        pytest.raises(BadInput, match=f"{file} is a link that leads out|config.json is missing"),
        open_checkpoint(locate(str(source)).ref) as opened,
    ):
        opened.companions()
