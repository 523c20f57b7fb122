"""Files and folders are whole or not there, and a damaged one is named."""

import json

import pytest

from transformers_sslam.files import (
    MANIFEST,
    DamagedFileError,
    read_json,
    verify,
    write_atomically,
    write_folder_atomically,
    write_json,
)


def test_json_cut_at_any_length_is_damaged(tmp_path):
    write_json(tmp_path / "a.json", {"a": float("nan"), "b": [1, "é"]})
    assert read_json(tmp_path / "a.json") == {"a": None, "b": [1, "é"]}
    whole = (tmp_path / "a.json").read_bytes()
    for content in [whole[:length] for length in range(len(whole) - 1)] + [b"[1]", b"\xff", b"[" * 100_000]:
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(DamagedFileError, match=r"a\.json is damaged"):
            read_json(tmp_path / "a.json")


def test_an_error_leaves_the_old_file_and_folder(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(TypeError), write_atomically(tmp_path / "a") as file:
        file.write(b"new")
    with pytest.raises(KeyError), write_folder_atomically(tmp_path / "b"):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_each_flipped_bit_of_a_manifest_is_damage_or_changes_nothing(tmp_path):
    with write_folder_atomically(tmp_path / "a", manifest=True) as folder:
        (folder / "x.bin").write_bytes(b"weights")
    assert verify(tmp_path / "a") is None
    manifest = tmp_path / "a" / MANIFEST
    whole = manifest.read_bytes()
    for i in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[i // 8] ^= 1 << i % 8
        manifest.write_bytes(flipped)
        try:
            same = json.loads(flipped) == json.loads(whole)
        except ValueError:
            same = False
        assert (verify(tmp_path / "a") is None) == same
    (tmp_path / "outside").write_bytes(b"weights")
    manifest.write_text(json.dumps({"../outside": json.loads(whole)["x.bin"]}))
    assert "not a file below" in verify(tmp_path / "a")


def test_sealed_json_that_was_changed_is_damaged(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": float("nan"), 2: [1, 0.1, "é"], "b": (3, None)}, sealed=True)
    assert read_json(path) == {"a": None, "2": [1, 0.1, "é"], "b": [3, None]}
    content = path.read_text()
    path.write_text(content.replace("0.1", "0.3"))
    with pytest.raises(DamagedFileError, match=r"a\.json is damaged: it was changed since it was written"):
        read_json(path)
    path.write_text(json.dumps(json.loads(content), sort_keys=True))  # only laid out otherwise
    assert read_json(path)["2"] == [1, 0.1, "é"]
