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
from transformers_sslam.evaluation.features import POOLINGS, block_numbers, encode_clips, hash_waveforms
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


def alone(model, extractor, clip) -> list[np.ndarray]:
    """Tokens `(1 + patches, hidden_size)` of the first block's input and of each block, of a clip without padding."""
    inputs = extractor(clip, sampling_rate=16_000, padding="longest", return_attention_mask=True, return_tensors="pt")
    with torch.inference_mode():
        return [tokens[0].numpy() for tokens in model(**inputs, output_hidden_states=True).hidden_states]


def by_definition(pooling: str, tokens: np.ndarray) -> np.ndarray:
    patches = tokens[1:]
    grid = patches.reshape(-1, 8, 32)  # time, frequency, channels
    return {
        "cls": tokens[0],
        "mean": patches.mean(0),
        "mean_and_std": np.concatenate((patches.mean(0), patches.std(0))),
        "max_by_frequency": grid.max(0).reshape(-1),
        "mean_and_max_by_frequency": np.concatenate((grid.mean(0).reshape(-1), grid.max(0).reshape(-1))),
    }[pooling]


def test_tokens_are_those_of_each_clip_alone(model, extractor):
    """Clips of unequal length in one batch, each as if alone and without its padding."""
    features = encode_clips(model, extractor, CLIPS, patch_dtype="float32", batch_size=2)
    tokens, mask = features.patch_tokens(np.arange(3))
    assert tokens.shape == (3, 16 * 8, 32)
    assert mask.sum(1).tolist() == [3 * 8, 13 * 8, 8 * 8]  # 48, 198 and 128 frames in steps of 16
    for i, clip in enumerate(CLIPS):
        np.testing.assert_allclose(tokens[i][mask[i]], alone(model, extractor, clip)[-1][1:], atol=1e-5)


@pytest.mark.parametrize("pooling", list(POOLINGS))
def test_each_pooling_of_each_block_is_of_the_clip_without_its_padding(pooling, model, extractor):
    features = encode_clips(model, extractor, CLIPS, layers=[0, 1, 2], keep_patches=False, batch_size=2)
    assert features.blocks == (0, 1, 2)
    for i, clip in enumerate(CLIPS):
        expected = [by_definition(pooling, tokens) for tokens in alone(model, extractor, clip)]
        for block in range(3):
            np.testing.assert_allclose(features.pooled(pooling, block)[i], expected[block], atol=1e-5)
        np.testing.assert_array_equal(features.pooled(pooling), features.pooled(pooling, 2))  # the last one, unless one is named
        np.testing.assert_allclose(features.pooled_blocks(pooling, np.array([i]))[0], expected[1:], atol=1e-5)


def test_patches_are_those_of_the_block_that_was_asked_for(model, extractor, tmp_path, calls):
    features = encode_clips(model, extractor, CLIPS, tmp_path, patch_layer=1, patch_dtype="float32")
    tokens, mask = features.patch_tokens(np.arange(3))
    np.testing.assert_allclose(tokens[0][mask[0]], alone(model, extractor, CLIPS[0])[1][1:], atol=1e-5)
    assert features.blocks == (2,)
    assert [path.name for path in tmp_path.glob("*/patches.npy")] == ["patches.npy"]  # of no other block


def test_blocks_are_named_by_numbers_from_either_end_or_all_at_once():
    assert block_numbers(["all"], 3) == (1, 2, 3)
    assert block_numbers([-1], 3) == (3,)
    assert block_numbers([3, 0, -3, -1], 3) == (0, 1, 3)
    for wrong in ([], [4], [-4], ["all", 1], ["last"], [True]):
        with pytest.raises(UserError, match="numbers from -3 to 3 are expected"):
            block_numbers(wrong, 3)


def test_a_block_that_was_not_encoded_is_an_error(model, extractor):
    with pytest.raises(UserError, match="block 1 was not encoded, only 2"):
        encode_clips(model, extractor, CLIPS).pooled("mean", 1)


def test_the_log_mel_is_pooled_as_patches_are(model, extractor):
    features = encode_clips(model, extractor, CLIPS).log_mel
    for i, clip in enumerate(CLIPS):
        log_mels = (log_mel(torch.from_numpy(clip - clip.mean())).double().numpy() + 4.268) / (2 * 4.569)
        mean, std, largest = log_mels.mean(0), log_mels.std(0), log_mels.max(0)
        for pooling, expected in {
            "mean": mean,
            "mean_and_std": np.concatenate((mean, std)),
            "max_by_frequency": largest,
            "mean_and_max_by_frequency": np.concatenate((mean, largest)),
        }.items():
            np.testing.assert_allclose(features.pooled(pooling)[i], expected, atol=1e-5)
    statistics = features.pooled("mean_and_std")
    silent_bin = statistics[:, 128:].min(0).argmin()  # the filter that lies between two FFT bins
    assert statistics[:, 128 + silent_bin].tolist() == [0, 0, 0]
    assert len(set(statistics[:, silent_bin])) == 1


def test_some_clips_can_be_selected_and_selected_again(model, extractor):
    features = encode_clips(model, extractor, CLIPS)
    chosen = features.select(np.array([2, 0])).select(np.array([1]))
    assert len(chosen) == 1
    np.testing.assert_array_equal(chosen.pooled("cls"), features.pooled("cls")[:1])
    np.testing.assert_array_equal(chosen.log_mel.pooled("mean"), features.log_mel.pooled("mean")[:1])
    assert torch.equal(chosen.patch_tokens(np.array([0]))[0], features.patch_tokens(np.array([0]))[0])
    assert chosen.patch_tokens(np.array([0]))[1].sum() == 24


def test_a_cache_is_written_once_and_read_after_that(model, extractor, tmp_path, calls):
    first = encode_clips(model, extractor, CLIPS, tmp_path, batch_size=2)
    assert calls == [2, 1]
    second = encode_clips(model, extractor, CLIPS, tmp_path, batch_size=3)
    assert calls == [2, 1]
    assert all(isinstance(array, np.memmap) for array in second.arrays.values())
    assert second.arrays["patches"].dtype == np.float16
    in_memory = encode_clips(model, extractor, CLIPS, batch_size=2)
    assert first.arrays.keys() == second.arrays.keys() == in_memory.arrays.keys()
    for name, array in first.arrays.items():
        np.testing.assert_array_equal(array, second.arrays[name])
        np.testing.assert_array_equal(array, in_memory.arrays[name])


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


def change_layers(model, extractor, clips, options):
    options["layers"] = [1]


def change_patch_layer(model, extractor, clips, options):
    options["patch_layer"] = 1


@pytest.mark.parametrize(
    "change",
    [
        *(change_weights, change_config, change_extractor, change_a_sample, change_order, change_borders),
        *(change_patch_dtype, drop_patches, change_layers, change_patch_layer),
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
    assert encode_clips(model, extractor, CLIPS, tmp_path, data_key=key).pooled("mean").any(1).all()


def test_what_a_killed_run_left_is_not_read(model, extractor, tmp_path, calls):
    expected = encode_clips(model, extractor, CLIPS, tmp_path).pooled("mean")
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (folder / "mean.npy").write_bytes(b"half")
    killed = subprocess.Popen([sys.executable, "-c", "pass"])  # a process that is no more
    killed.wait()
    left = tmp_path / f".{folder.name}.{socket.gethostname()}.{killed.pid}.unfinished"
    folder.rename(left)  # what stands there before the last step
    again = encode_clips(model, extractor, CLIPS, tmp_path)
    assert calls == [3, 3]
    np.testing.assert_array_equal(again.pooled("mean"), expected)
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
    expected = {name: np.array(whole.arrays[name]) for name in ("patches", "mean", "lengths")}
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
        np.testing.assert_array_equal(again.arrays[name], values)
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
    assert encode_clips(model, extractor, CLIPS, patch_dtype="float32").arrays["patches"][..., 0].min() > 0.9e6


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
