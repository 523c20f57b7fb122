"""Frozen features: their definition, and a cache that is computed once, whole, and verified."""

import os
import socket
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from conftest import noise, tiny_config

from transformers_sslam import SSLAMFeatureExtractor, SSLAMModel
from transformers_sslam.errors import UserError
from transformers_sslam.evaluation import features as module
from transformers_sslam.evaluation.features import encode_clips, hash_waveforms
from transformers_sslam.fbank import log_mel


CLIPS = [noise(0.5), noise(2.0, seed=1), noise(1.3, seed=2)]


@pytest.fixture
def model() -> SSLAMModel:
    return SSLAMModel(tiny_config()).eval()


@pytest.fixture
def extractor() -> SSLAMFeatureExtractor:
    return SSLAMFeatureExtractor(max_length=256)


@pytest.fixture
def calls(model, monkeypatch) -> list[int]:
    """The number of clips of each call of the encoder."""
    sizes, forward = [], SSLAMModel.forward

    def counting(self, input_values, **kwargs):
        sizes.append(len(input_values))
        return forward(self, input_values, **kwargs)

    monkeypatch.setattr(SSLAMModel, "forward", counting)
    return sizes


def test_tokens_are_those_of_each_clip_alone(model, extractor):
    """Clips of unequal length in one batch, each as if alone and without its padding."""
    features = encode_clips(model, extractor, CLIPS, patch_dtype="float32", batch_size=2)
    tokens, mask = features.patch_tokens(np.arange(3))
    assert tokens.shape == (3, 16 * 8, 32)
    assert features.lengths.tolist() == [3 * 8, 13 * 8, 8 * 8]  # 48, 198 and 128 frames in steps of 16
    for i, clip in enumerate(CLIPS):
        inputs = extractor(clip, sampling_rate=16_000, padding="longest", return_attention_mask=True, return_tensors="pt")
        with torch.inference_mode():
            alone = model(**inputs).last_hidden_state[0]
        np.testing.assert_allclose(features.cls[i], alone[0], atol=1e-5)
        np.testing.assert_allclose(features.mean[i], alone[1:].mean(0), atol=1e-5)
        np.testing.assert_allclose(features.mean_and_std[i], np.concatenate((alone[1:].mean(0), alone[1:].numpy().std(0))), atol=1e-5)
        np.testing.assert_allclose(tokens[i][mask[i]], alone[1:], atol=1e-5)


def test_statistics_are_those_of_each_mel_bin_without_padding(model, extractor):
    features = encode_clips(model, extractor, CLIPS)
    for row, clip in zip(features.statistics, CLIPS):
        log_mels = (log_mel(torch.from_numpy(clip - clip.mean())).double().numpy() + 4.268) / (2 * 4.569)
        np.testing.assert_allclose(row, np.concatenate((log_mels.mean(0), log_mels.std(0))), atol=1e-5)
    silent_bin = features.statistics[:, 128:].min(0).argmin()  # the filter that lies between two FFT bins
    assert features.statistics[:, 128 + silent_bin].tolist() == [0, 0, 0]
    assert len(set(features.statistics[:, silent_bin])) == 1


def test_some_clips_can_be_selected_and_selected_again(model, extractor):
    features = encode_clips(model, extractor, CLIPS)
    chosen = features.select(np.array([2, 0])).select(np.array([1]))
    assert len(chosen) == 1
    np.testing.assert_array_equal(chosen.cls, features.cls[:1])
    assert torch.equal(chosen.patch_tokens(np.array([0]))[0], features.patch_tokens(np.array([0]))[0])
    assert chosen.patch_tokens(np.array([0]))[1].sum() == 24


def test_a_cache_is_written_once_and_read_after_that(model, extractor, tmp_path, calls):
    first = encode_clips(model, extractor, CLIPS, tmp_path, batch_size=2)
    assert calls == [2, 1]
    second = encode_clips(model, extractor, CLIPS, tmp_path, batch_size=3)
    assert calls == [2, 1]
    assert isinstance(second.patches, np.memmap)
    assert second.patches.dtype == np.float16
    in_memory = encode_clips(model, extractor, CLIPS, batch_size=2)
    for name in ("cls", "mean", "std", "statistics", "lengths", "patches", "rows"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
        np.testing.assert_array_equal(getattr(first, name), getattr(in_memory, name))


def test_the_same_weights_share_a_cache_wherever_they_were_loaded_from(model, extractor, tmp_path, calls):
    encode_clips(model, extractor, CLIPS, tmp_path / "cache")
    for name in ("here", "there"):
        model.save_pretrained(tmp_path / name)
        encode_clips(SSLAMModel.from_pretrained(tmp_path / name), extractor, CLIPS, tmp_path / "cache")
    assert calls == [3]


def change_weights(model, extractor, clips, options):
    with torch.no_grad():
        model.layers[1].mlp.fc2.bias[3] += 1e-6


def change_config(model, extractor, clips, options):
    model.config.padding_value += 0.1


def change_extractor(model, extractor, clips, options):
    extractor.mean -= 1e-6


def change_a_sample(model, extractor, clips, options):
    clips[1] = clips[1].copy()
    clips[1][77] += 1e-6


def change_order(model, extractor, clips, options):
    clips.reverse()


def change_borders(model, extractor, clips, options):
    clips[:2] = [np.concatenate((clips[0], clips[1][:8000])), clips[1][8000:]]


def change_patch_dtype(model, extractor, clips, options):
    options["patch_dtype"] = "float32"


def drop_patches(model, extractor, clips, options):
    options["keep_patches"] = False


@pytest.mark.parametrize(
    "change",
    [
        *(change_weights, change_config, change_extractor, change_a_sample, change_order, change_borders),
        *(change_patch_dtype, drop_patches),
    ],
)
def test_each_change_of_features_has_a_cache_of_its_own(change, model, extractor, tmp_path, calls):
    clips, options = list(CLIPS), {}
    before = encode_clips(model, extractor, clips, tmp_path)
    change(model, extractor, clips, options)
    after = encode_clips(model, extractor, clips, tmp_path, **options)
    assert calls == [3, 3]
    assert len([folder for folder in tmp_path.iterdir() if folder.is_dir()]) == 2
    assert len(before) == len(after) == 3


def test_a_key_of_the_data_replaces_their_reading(model, extractor, tmp_path):
    class Closed(list):
        def __getitem__(self, i):
            raise AssertionError("the clips were read, but only the cache should be")

    encode_clips(model, extractor, CLIPS, tmp_path, data_key=hash_waveforms(CLIPS))
    encode_clips(model, extractor, Closed(CLIPS), tmp_path, data_key=hash_waveforms(CLIPS))


def test_memory_holds_a_batch_of_clips_and_the_next_one(model, extractor, tmp_path):
    alive, most = set(), 0

    class Decoding:
        def __len__(self):
            return 12

        def __getitem__(self, i):
            nonlocal most
            clip = noise(0.3, seed=i)
            alive.add(i)
            weakref.finalize(clip, alive.discard, i)
            most = max(most, len(alive))
            return clip

    assert len(encode_clips(model, extractor, Decoding(), tmp_path, batch_size=3)) == 12
    assert most <= 2 * 3 + 1  # the next batch is prepared in the background


def test_a_run_that_ends_early_leaves_nothing_that_looks_whole(model, extractor, tmp_path):
    class Ending(list):
        def __getitem__(self, i):
            if i == 2:
                raise KeyboardInterrupt
            return super().__getitem__(i)

    key = hash_waveforms(CLIPS)
    with pytest.raises(KeyboardInterrupt):
        encode_clips(model, extractor, Ending(CLIPS), tmp_path, data_key=key, batch_size=1)
    assert [path.suffix for path in tmp_path.iterdir()] in ([".lock"], [])
    assert encode_clips(model, extractor, CLIPS, tmp_path, data_key=key).mean.any(1).all()


def test_what_a_killed_run_left_is_not_read(model, extractor, tmp_path, calls):
    expected = np.array(encode_clips(model, extractor, CLIPS, tmp_path).mean)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (folder / "mean.npy").write_bytes(b"half")
    killed = subprocess.Popen([sys.executable, "-c", "pass"])  # a process that is no more
    killed.wait()
    left = tmp_path / f".{folder.name}.{socket.gethostname()}.{killed.pid}.unfinished"
    folder.rename(left)  # what stands there before the last step
    again = encode_clips(model, extractor, CLIPS, tmp_path)
    assert calls == [3, 3]
    np.testing.assert_array_equal(again.mean, expected)
    assert not left.exists()


def flip(content: bytes, bit: int) -> bytes:
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


DAMAGE = {
    "shortened": lambda content: content[:-100],
    "longer": lambda content: content + bytes(100),
    "overwritten": lambda content: b"no array at all",
    "empty": lambda content: b"",
    "missing": None,
    "a bit of the values": lambda content: flip(content, 8 * len(content) - 1003),
    "a bit of the header": lambda content: flip(content, 300),
    "NaN": lambda content: content[:-8] + np.array([np.nan, np.nan], np.float32).tobytes(),
    "zeros": lambda content: content[:-400] + bytes(400),
}


@pytest.mark.parametrize(
    ("array", "damage"),
    [
        (array, damage)
        for array in ("patches", "mean", "lengths", "manifest")
        for damage in DAMAGE
        if array != "manifest" or damage not in ("zeros", "NaN", "longer")  # which are damages of arrays
    ],
)
def test_damaged_features_are_computed_again_with_a_warning(damage, array, model, extractor, tmp_path, calls, caplog):
    whole = encode_clips(model, extractor, CLIPS, tmp_path)
    expected = {name: np.array(getattr(whole, name)) for name in ("patches", "mean", "lengths")}
    (file,) = tmp_path.glob(f"*/{array}.*")
    times = file.stat().st_mtime_ns
    content = file.read_bytes()
    del whole
    file.unlink()
    if DAMAGE[damage]:
        file.write_bytes(DAMAGE[damage](content))
        os.utime(file, ns=(times, times))  # a disk that loses a bit leaves the time as it was
    again = encode_clips(model, extractor, CLIPS, tmp_path)
    for name, values in expected.items():
        np.testing.assert_array_equal(getattr(again, name), values)
    assert calls == [3, 3]
    assert [record.getMessage().endswith("the clips are encoded again.") for record in caplog.records] == [True]


def test_features_that_are_not_finite_are_rejected_and_not_kept(model, extractor, tmp_path):
    with torch.no_grad():
        model.layers[1].layernorm_after_mlp.bias[0] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        encode_clips(model, extractor, CLIPS, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_tokens_beyond_float16_are_rejected_and_not_clipped(model, extractor):
    with torch.no_grad():
        model.layers[1].layernorm_after_mlp.bias[0] = 1e6
    with pytest.raises(UserError, match="1e\\+06.*float32"):
        encode_clips(model, extractor, CLIPS)
    assert encode_clips(model, extractor, CLIPS, patch_dtype="float32").patches[..., 0].min() > 0.9e6


def test_what_cannot_be_encoded_is_rejected(model, extractor, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no clip"):
        encode_clips(model, extractor, [])
    with pytest.raises(UserError, match="1024 frames.*256"):
        encode_clips(model, SSLAMFeatureExtractor(), CLIPS)
    with pytest.raises(UserError, match="keep_patches"):
        encode_clips(model, extractor, CLIPS, keep_patches=False).patch_tokens(np.arange(3))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="free"):
        encode_clips(model, extractor, CLIPS, tmp_path)
