# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""Files are written whole or not at all, may be read by whom the umask lets, and failures name them."""

import errno
import os
import stat
import tempfile
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ham_hf import HAMForCausalLM
from ham_hf.files import copy_whole, write_whole
from ham_hf.files_ham import whole_file


@pytest.fixture(params=[0o022, 0o007, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def fail_amid(path, failure):
    with whole_file(path) as unfinished:
        unfinished.write_text("new")
        raise failure


def permissions(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_permissions_follow_the_umask(tmp_path, umask):
    write_whole(tmp_path / "text", "x")
    copy_whole(tmp_path / "text", tmp_path / "copy")
    with whole_file(tmp_path / "tensors") as unfinished:
        save_file({"x": torch.ones(2)}, unfinished)
    assert {permissions(path) for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_saved_models_follow_the_umask(tmp_path, tiny_config, umask):
    """As everything else that is saved with them; also in shards, and over weights that were there."""
    HAMForCausalLM(tiny_config()).save_pretrained(tmp_path)
    assert permissions(tmp_path / "model.safetensors") == 0o666 & ~umask
    (tmp_path / "other.safetensors").touch(0o600)
    HAMForCausalLM(tiny_config()).save_pretrained(tmp_path, max_shard_size="20KB")
    shards = [*tmp_path.glob("model-*.safetensors")]
    assert len(shards) > 1
    assert {permissions(path) for path in shards} == {0o666 & ~umask}
    assert permissions(tmp_path / "other.safetensors") == 0o600, "somebody else's"


def test_what_fails_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "file"
    write_whole(target, "old")
    for failure in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(failure):
            fail_amid(target, failure)
        monkeypatch.setattr("os.replace", Mock(side_effect=failure))
        with pytest.raises(failure):
            write_whole(target, "new")
        monkeypatch.undo()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_two_writers_do_not_meet(tmp_path):
    target = tmp_path / "file"
    with whole_file(target) as first, whole_file(target) as second:
        first.write_text("first")
        second.write_text("second")
        assert first != second
    assert target.read_text() == "first"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("name", "error"), [("missing/file", FileNotFoundError), ("folder", IsADirectoryError), ("text/x", OSError)]
)
def test_what_cannot_be_written_is_named(tmp_path, name, error):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("")
    for write in (lambda path: write_whole(path, "x"), lambda path: copy_whole(tmp_path / "text", path)):
        with pytest.raises(error) as caught:
            write(tmp_path / name)
        assert caught.value.filename == str(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["folder", "text"]
    assert not os.listdir(tmp_path / "folder")


def test_a_full_disk_is_named(tmp_path):
    def write_to_a_full_disk():
        with whole_file(target) as unfinished:
            unfinished.unlink()
            unfinished.symlink_to("/dev/full")
            unfinished.write_text("x")

    target = tmp_path / "file"
    with pytest.raises(OSError, match="No space left") as caught:
        write_to_a_full_disk()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(target))
    with pytest.raises(OSError, match=f"Cannot write {target}: .*os error 28"):
        fail_amid(target, SafetensorError("Error while serializing: I/O error: No space left (os error 28)"))
    assert not os.listdir(tmp_path)


def test_a_missing_source_is_named_and_not_its_copy(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        copy_whole(tmp_path / "missing", tmp_path / "copy")
    assert caught.value.filename == str(tmp_path / "missing")
    assert not os.listdir(tmp_path)


def test_what_a_killed_process_left_is_removed(tmp_path):
    """And nothing that another process holds, nor what is the user's."""
    left = tmp_path / ".kept.x7.partial"
    left.mkdir()
    (left / "kept").write_text("half")
    own = [tmp_path / name for name in ("kept.partial", ".kept.mine.partial", ".other.x7.partial")]
    for path in own:
        path.write_text("mine")
    with whole_file(tmp_path / "kept") as first:
        write_whole(tmp_path / "kept", "second")
        first.write_text("first")
    assert not left.exists()
    assert all(path.read_text() == "mine" for path in own)
    assert (tmp_path / "kept").read_text() == "first"
    assert len(os.listdir(tmp_path)) == 4


def test_a_folder_that_is_taken_for_abandoned_before_it_is_held(tmp_path, monkeypatch):
    """The writer makes another one."""
    make, made = tempfile.mkdtemp, []

    def make_and_lose(*arguments):
        made.append(make(*arguments))
        if len(made) == 1:
            os.rmdir(made[0])
        return made[-1]

    monkeypatch.setattr("tempfile.mkdtemp", make_and_lose)
    write_whole(tmp_path / "file", "x")
    assert len(made) == 2
    assert os.listdir(tmp_path) == ["file"]


def test_models_that_cannot_be_saved_say_so(tmp_path, tiny_config, monkeypatch):
    model = HAMForCausalLM(tiny_config())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError) as caught:
        model.save_pretrained(tmp_path / "file")
    assert caught.value.filename == str(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"

    def full(*arguments, **named):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match=f"Cannot write the weights to {tmp_path}/model: .*No space left"):
        model.save_pretrained(tmp_path / "model")
    monkeypatch.undo()
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(load_file(tmp_path / "model/model.safetensors")["lm_head.weight"], model.lm_head.weight)
