"""Checkpoints are whole or not there; schedules are functions of the update."""

import json
import math
import os
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from transformers_sslam import files
from transformers_sslam.checkpoints import (
    MANIFEST,
    begin_checkpoint,
    checkpoint_folder,
    finish_checkpoint,
    latest_whole_checkpoint,
    sweep,
    sweep_leftovers,
    sweep_unsealed,
)
from transformers_sslam.files import verify
from transformers_sslam.pretraining.schedules import adam_epsilon, learning_rate


def write(output_dir, update, content=b"weights"):
    folder = begin_checkpoint(output_dir, update)
    (folder / "model.bin").write_bytes(content)
    (folder / "run.json").write_text("{}")
    return finish_checkpoint(folder)


def names(output_dir):
    return sorted(path.name for path in output_dir.iterdir())


def test_a_finished_checkpoint_is_whole_and_the_newest_is_found(tmp_path):
    for update in (9, 10, 2):
        assert verify(write(tmp_path, update)) is None
    assert latest_whole_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 10)
    assert latest_whole_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model.bin").unlink(), r"model\.bin is missing"),
        (lambda folder: (folder / "model.bin").write_bytes(b"weigh"), r"model\.bin has 5 bytes instead of 7"),
        (lambda folder: (folder / "model.bin").write_bytes(b"weightz"), r"model\.bin has changed"),
        (lambda folder: (folder / "manifest.json").write_text("{"), r"manifest\.json cannot be read"),
        (lambda folder: (folder / "manifest.json").unlink(), r"manifest\.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog, spoil, message):
    write(tmp_path, 1)
    spoil(write(tmp_path, 2))
    assert latest_whole_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 1)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert re.search(message, caplog.text)


def test_an_older_checkpoint_is_taken_whatever_happens_to_the_manifest_of_the_last(tmp_path):
    good, folder = write(tmp_path, 1), write(tmp_path, 2)
    whole = (folder / MANIFEST).read_bytes()
    values = json.loads(whole)
    contents = [whole[:length] for length in range(len(whole) - 2)] + [b"[]", b"{}", b"null", b"7", b'"a"', b"\xff", b"[" * 100_000]
    contents += [json.dumps({**values, "model.bin": wrong}).encode() for wrong in (None, [], {}, 7, {"bytes": "7", "sha256": 1})]
    contents += [json.dumps({name: values["model.bin"]}).encode() for name in ("", "..", "/etc/passwd", "a\0b", "x" * 5000, "../model.bin")]
    contents += [whole.replace(b"sha256", b"sha257"), whole.replace(b"bytes", b"bytez"), whole.replace(b"model.bin", b"model.bio")]
    for content in contents:
        (folder / MANIFEST).write_bytes(content)
        assert latest_whole_checkpoint(tmp_path) == good
    (folder / MANIFEST).write_bytes(whole)
    assert latest_whole_checkpoint(tmp_path) == folder


def test_nothing_is_begun_anew_over_damaged_checkpoints(tmp_path):
    assert latest_whole_checkpoint(tmp_path) is None
    for update in (1, 2):
        (write(tmp_path, update) / MANIFEST).unlink()
    with pytest.raises(ValueError, match="all 2 checkpoints in .* are damaged"):
        latest_whole_checkpoint(tmp_path)


def test_a_disk_that_fails_is_no_damage(tmp_path, monkeypatch):
    folder = write(tmp_path, 1)

    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_text", fail)
    with pytest.raises(OSError, match="Input/output error"):
        verify(folder)


def test_a_run_killed_while_writing_or_deleting_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    write(tmp_path, 1)
    (begin_checkpoint(tmp_path, 2) / "model.bin").write_bytes(b"half")
    assert latest_whole_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 1)
    write(tmp_path, 3)
    removed = []
    monkeypatch.setattr(files.shutil, "rmtree", lambda path, **_: removed.append(path.name))  # as if killed before it does anything
    sweep(tmp_path, 3, save_total_limit=1, keep_steps=None)
    monkeypatch.undo()
    assert names(tmp_path) == ["checkpoint-00000001.discarded", "checkpoint-00000002.unfinished", "checkpoint-00000003"]
    assert set(removed) == {"checkpoint-00000001.discarded"}
    sweep_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-00000003"]


def test_checkpoints_of_a_trainer_that_were_not_finished_are_deleted(tmp_path):
    write(tmp_path, 1)
    (write(tmp_path, 2) / MANIFEST).unlink()
    (write(tmp_path, 3) / MANIFEST).write_text("{")  # damaged, which is another thing: it is passed over, not deleted
    sweep_unsealed(tmp_path)
    assert names(tmp_path) == ["checkpoint-00000001", "checkpoint-00000003"]
    sweep_unsealed(tmp_path / "absent")


def test_the_manifest_is_on_disk_before_the_name(tmp_path, monkeypatch):
    """Every file is flushed before the rename, and the parent folder after it."""
    flushed, renamed = [], []
    real_flush, real_rename = files.flush, os.rename
    monkeypatch.setattr(files, "flush", lambda path: (flushed.append((path.name, bool(renamed))), real_flush(path)))
    monkeypatch.setattr(files.os, "rename", lambda a, b: (renamed.append(b), real_rename(a, b)))
    write(tmp_path, 1)
    before = [name for name, after in flushed if not after]
    assert before[:2] == ["model.bin", "run.json"]  # the manifest is written after them, and flushed by `write_atomically`
    assert set(before) == {"model.bin", "run.json", "manifest.json", "checkpoint-00000001.unfinished"}
    assert before[-1] == "checkpoint-00000001.unfinished"
    assert [name for name, after in flushed if after] == [tmp_path.name]


def test_the_last_and_every_so_many_are_kept(tmp_path):
    for update in range(10, 80, 10):
        write(tmp_path, update)
    sweep(tmp_path, 70, save_total_limit=2, keep_steps=30)
    assert names(tmp_path) == [f"checkpoint-{update:08d}" for update in (30, 60, 70)]


def test_later_checkpoints_that_were_passed_over_do_not_cost_the_new_ones(tmp_path):
    for update in (1, 2, 3, 8, 9):
        write(tmp_path, update)
    sweep(tmp_path, 3, save_total_limit=2, keep_steps=None)
    assert names(tmp_path) == [f"checkpoint-{update:08d}" for update in (2, 3, 8, 9)]


def test_the_same_update_can_be_written_again(tmp_path):
    write(tmp_path, 1, b"old")
    folder = write(tmp_path, 1, b"new")
    assert (folder / "model.bin").read_bytes() == b"new"
    assert names(tmp_path) == ["checkpoint-00000001"]


def test_learning_rate_warms_up_from_zero_and_ends_at_the_floor():
    rates = [learning_rate(update, 5e-5, 25_000, 200_000) for update in (1, 12_501, 25_001, 112_501, 200_001)]
    assert rates == pytest.approx([0.0, 2.5e-5, 5e-5, 2.5e-5, 0.0], abs=1e-18)
    assert learning_rate(10**9, 1.0, 10, 100, final=0.1) == pytest.approx(0.1)
    assert learning_rate(1, 1.0, 0, 100) == 1.0
    steps = [learning_rate(update, 1.0, 10, 100) for update in range(1, 101)]
    assert max(steps) == steps[10] == 1.0
    assert all(a >= b for a, b in pairwise(steps[10:]))


def test_epsilon_is_added_before_the_bias_correction():
    """Three steps of torch's AdamW against the published update, written out."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(50))
    expected, m, v = parameter.detach().clone(), torch.zeros(50), torch.zeros(50)
    optimizer = torch.optim.AdamW([parameter], lr=0.0, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    for update in (1, 2, 3):
        gradient = torch.randn(50) * 1e-8  # where epsilon matters
        optimizer.param_groups[0].update(lr=1e-2, eps=adam_epsilon(update, 1e-8, 0.95))
        parameter.grad = gradient
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        step = 1e-2 * math.sqrt(1 - 0.95**update) / (1 - 0.9**update) * m / (v.sqrt() + 1e-8)
        expected = expected * (1 - 1e-2 * 0.05) - step
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-7, rtol=1e-5)
