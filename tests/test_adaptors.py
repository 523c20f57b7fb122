"""X-ARES and HEAR: the checks of their own programs, on encoders of this package."""

import importlib
import io
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from conftest import noise, speech_like, tiny_config

from transformers_sslam import SSLAMFeatureExtractor, SSLAMModel


pytest.importorskip("tqdm")
from transformers_sslam import cli
from transformers_sslam.errors import AudioDecodingError, UserError
from transformers_sslam.evaluation.adaptors import hear, xares
from transformers_sslam.evaluation.adaptors.embedder import Embedder
from transformers_sslam.evaluation.features import encode_clips


RATE = 16_000
WIDTH, STEP = 32, 2560  # of the tiny encoder; samples of a time step
# Samples: one, around the first frame, in and around a time step, a whole window of the encoder, longer than one, and than two.
LENGTHS = [1, 399, 400, 2000, 2799, 2800, 10_480, 10_481, 16_000, 30_000]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Untrained; a window is 64 frames."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    SSLAMModel(tiny_config(initializer_range=0.3)).save_pretrained(folder)
    SSLAMFeatureExtractor(max_length=64).save_pretrained(folder)
    return str(folder)


def audio_of(samples: int, sounds: int = 3) -> torch.Tensor:
    return 2 * torch.rand(sounds, samples) - 1


def steps_of(samples: int) -> int:
    return -(-max(1, 1 + (samples - 400) // 160) // 16)  # frames of 25 ms every 10 ms, 16 a step


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# HEAR: what its validator asks for


def test_hear_model_has_a_rate_of_hear_and_sizes(model):
    found = hear.load_model(model, device="cpu", pooling="mean_and_std", layers=[1, 2])
    assert isinstance(found, torch.nn.Module)
    assert found.sample_rate == RATE
    assert found.sample_rate in (16_000, 22_050, 44_100, 48_000)
    assert (found.scene_embedding_size, found.timestamp_embedding_size) == (4 * WIDTH, 2 * WIDTH)
    assert isinstance(found.scene_embedding_size, int)
    assert isinstance(found.timestamp_embedding_size, int)


@pytest.mark.parametrize("samples", LENGTHS)
def test_hear_embeddings_have_shape_type_and_centred_times_at_any_length(model, samples):
    loaded, audio = hear.load_model(model, device="cpu"), audio_of(samples)
    scenes = hear.get_scene_embeddings(audio, loaded)
    assert scenes.shape == (3, loaded.scene_embedding_size)
    embeddings, times = hear.get_timestamp_embeddings(audio, loaded)
    assert embeddings.shape == (3, steps_of(samples), loaded.timestamp_embedding_size)
    assert times.shape == embeddings.shape[:2]
    assert scenes.dtype == embeddings.dtype == times.dtype == torch.float32
    assert scenes.isfinite().all()
    assert embeddings.isfinite().all()
    assert times[:, 0].tolist() == [80.0] * 3  # the middle of the first 160 ms
    assert (times.diff() == 160).all()


def test_hear_embeddings_do_not_depend_on_the_batch(model):
    loaded, audio = hear.load_model(model, device="cpu", pooling="mean_and_std"), audio_of(30_000, sounds=5)
    scenes = hear.get_scene_embeddings(audio, loaded)
    steps, _ = hear.get_timestamp_embeddings(audio, loaded)
    for i in range(5):
        assert relative_difference(hear.get_scene_embeddings(audio[i : i + 1], loaded)[0], scenes[i]) < 1e-5
        assert relative_difference(hear.get_timestamp_embeddings(audio[i : i + 1], loaded)[0][0], steps[i]) < 1e-5
    assert relative_difference(scenes[0], scenes[1]) > 1e-3


def test_a_hear_time_step_holds_the_sound_at_its_time(model):
    # The first block's input, because attention spreads what a step holds.
    loaded, audio = hear.load_model(model, device="cpu", layers=[0]), torch.zeros(1, 8 * STEP)
    audio[:, 5 * STEP : 6 * STEP] = audio_of(STEP, sounds=1)
    embeddings, times = hear.get_timestamp_embeddings(audio, loaded)
    silent, _ = hear.get_timestamp_embeddings(torch.zeros_like(audio), loaded)
    changed = (embeddings - silent)[0].norm(dim=1)
    assert times[0, changed.argmax()] == 5.5 * 160


def test_hear_rejects_audio_of_another_shape_and_models_of_another_rate(model, tmp_path):
    loaded = hear.load_model(model, device="cpu")
    for embed in (hear.get_scene_embeddings, hear.get_timestamp_embeddings):
        with pytest.raises(ValueError, match=r"the audio is of shape \(16000,\), but a tensor \(clips, samples\)"):
            embed(audio_of(RATE)[0], loaded)
        with pytest.raises(ValueError, match="not finite|NaN"):
            embed(torch.full((1, RATE), torch.nan), loaded)
    SSLAMModel(tiny_config()).save_pretrained(tmp_path)
    SSLAMFeatureExtractor(max_length=64, sampling_rate=8000).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="takes 8000 Hz, but the audio of HEAR has 16000, 22050, 44100, 48000 Hz"):
        hear.load_model(str(tmp_path), device="cpu")


# X-ARES: what its `check_audio_encoder` asks for


@pytest.fixture
def encoder_class(model) -> type[xares.SSLAMEncoder]:
    return type("TinyEncoder", (xares.SSLAMEncoder,), {"model": model})


def test_xares_finds_one_class_in_the_module():
    module = importlib.import_module("transformers_sslam.evaluation.adaptors.xares")
    assert [name for name in dir(module) if name.endswith("Encoder")] == ["SSLAMEncoder"]
    assert xares.SSLAMEncoder.model == "ta012/SSLAM_pretrain"


@pytest.mark.parametrize("samples", LENGTHS)
def test_xares_encoder_gives_a_vector_for_each_hop(encoder_class, samples):
    encoder = encoder_class()
    assert (encoder.sampling_rate, encoder.output_dim, encoder.hop_size_in_ms) == (RATE, WIDTH, 160)
    encoded = encoder(audio_of(samples))
    assert encoded.shape == (3, steps_of(samples), encoder.output_dim)
    assert encoded.dtype == torch.float32


def test_xares_accepts_the_encoder_by_its_own_check(encoder_class):
    checker = pytest.importorskip("xares.audio_encoder_checker")
    assert checker.check_audio_encoder(encoder_class())


def test_xares_encodings_do_not_depend_on_the_batch_and_are_those_of_encode(encoder_class, model):
    encoder, audio = encoder_class(), audio_of(30_000, sounds=4)
    encoded = encoder(audio)
    for i in range(4):
        assert relative_difference(encoder(audio[i : i + 1])[0], encoded[i]) < 1e-5
    plain, extractor = SSLAMModel.from_pretrained(model), SSLAMFeatureExtractor.from_pretrained(model)
    for clip, expected in zip(encoded, plain.encode(list(audio), extractor, per="step")):
        assert relative_difference(clip, expected.vectors) < 1e-5
    assert relative_difference(encoded[0], encoded[1]) > 1e-3


def test_xares_layers_and_patches_are_chosen_by_a_subclass(encoder_class):
    class DeepEncoder(encoder_class):
        layers = (1, -1)
        step_pooling = "patches"

    encoder, audio = DeepEncoder(), audio_of(RATE)
    encoded = encoder(audio)
    assert encoder.output_dim == 2 * 8 * WIDTH == encoded.shape[2]
    last = encoded[..., 8 * WIDTH :].unflatten(2, (8, WIDTH)).mean(2)
    assert relative_difference(last, encoder_class()(audio)) < 1e-5


ENCODER_FILE = """
import webdataset

from transformers_sslam.evaluation.adaptors import xares


class TinyEncoder(xares.SSLAMEncoder):
    model = {model!r}


webdataset.torch_audio = xares.decode_audio
"""
TASK_FILE = """
from xares.task import TaskConfig


def sounds_config(encoder) -> TaskConfig:
    return TaskConfig(encoder=encoder, name="sounds", private=True, output_dim=2, label_processor=lambda found: found["label"], epochs=40)
"""


def test_xares_runs_a_task_on_shards_without_ffmpeg(model, encoder_class, tmp_path):
    """Its own program, as the docs have it: every clip is decoded and encoded, and two kinds of sound are told apart."""
    pytest.importorskip("xares.run", reason="needs xares, which no extra brings: pip install xares")
    from xares.audiowebdataset import write_audio_tar

    soundfile = pytest.importorskip("soundfile")
    (tmp_path / "tiny_encoder.py").write_text(ENCODER_FILE.format(model=model))
    (tmp_path / "sounds_task.py").write_text(TASK_FILE)
    shards, waveforms = tmp_path / "env" / "sounds", {}
    shards.mkdir(parents=True)
    for split, first in (("train", 0), ("valid", 16), ("test", 24)):
        for i in range(first, first + (16 if split == "train" else 8)):
            waveforms[i] = speech_like(0.8) * (1 + i) / 40 if i % 2 else noise(0.8, seed=i)  # of one length: no padding
            soundfile.write(tmp_path / f"{i:02}.wav", waveforms[i], RATE, subtype="FLOAT")
        files = [str(tmp_path / f"{i:02}.wav") for i in waveforms if i >= first]
        write_audio_tar(files, [{"label": i % 2} for i in waveforms if i >= first], str(shards / f"{split}-*.tar"), num_shards=2)
    (shards / ".audio_tar_ready").touch()
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-m", "xares.run", "tiny_encoder.py", "sounds_task.py", "--max-jobs", "0"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    task, mlp, knn, _ = done.stdout.partition("Results:")[2].splitlines()[2].split()
    assert (task, float(mlp), float(knn)) == ("sounds", 1.0, 1.0)
    vectors = {}
    for tar in (shards / "embeddings" / "TinyEncoder").glob("*.tar"):
        with tarfile.open(tar) as file:
            for member in file.getmembers():
                if member.name.endswith(".npy"):
                    vectors[int(member.name[:2])] = torch.from_numpy(np.load(io.BytesIO(file.extractfile(member).read())))
    assert sorted(vectors) == sorted(waveforms)  # no clip was left out
    encoder = encoder_class()
    for i, found in vectors.items():
        assert relative_difference(found, encoder(torch.from_numpy(waveforms[i])[None])[0]) < 1e-5


def test_xares_decodes_files_of_shards_by_their_suffix(tmp_path, caplog):
    soundfile = pytest.importorskip("soundfile")
    pytest.importorskip("torchaudio")
    for suffix in ("wav", "flac", "ogg"):
        soundfile.write(tmp_path / f"a.{suffix}", np.stack([noise(1.0, 0, 44_100), noise(1.0, 1, 44_100)], axis=1), 44_100)
        decoded, rate = xares.decode_audio(suffix, (tmp_path / f"a.{suffix}").read_bytes())
        assert (rate, decoded.shape, decoded.dtype) == (RATE, (1, RATE), torch.float32)
        assert 0.01 < decoded.std() < 0.1
    assert xares.decode_audio("json", b"{}") is None
    with pytest.raises(AudioDecodingError):
        xares.decode_audio("wav", b"no audio")
    assert "X-ARES leaves a clip out, because it cannot be decoded" in caplog.text


# What both share


def test_mean_and_standard_deviation_are_those_of_the_probes(model):
    embedder = Embedder(model, device="cpu", pooling="mean_and_std")
    clips = [noise(0.3), speech_like(0.65), noise(0.5, seed=1)]
    features = encode_clips(embedder.encoder, embedder.extractor, clips, keep_patches=False)
    assert relative_difference(embedder.embed_clips(clips), torch.from_numpy(features.pooled("mean_and_std"))) < 1e-5


def test_mean_and_standard_deviation_of_a_long_clip_are_over_all_its_patches(model):
    """A window here is 64 frames: this clip has two whole ones, and 32 frames, each encoded by itself."""
    embedder = Embedder(model, device="cpu", pooling="mean_and_std", layers=[1, 2])
    clip = torch.from_numpy(speech_like(1.615))
    windows = [clip[:10_480], clip[10_240:20_720], clip[20_480:]]
    options = {"sampling_rate": RATE, "return_tensors": "pt"}
    with torch.inference_mode():
        states = [embedder.encoder(**embedder.extractor(window, padding=False, **options), output_hidden_states=True) for window in windows]
    expected = []
    for layer in (1, 2):
        patches = torch.cat([state.hidden_states[layer][0, 1:] for state in states])
        assert len(patches) == 8 * 10
        expected += [patches.mean(0), patches.std(0, correction=0)]
    assert relative_difference(embedder.embed_clips([clip])[0], torch.cat(expected)) < 1e-5


def test_the_mean_is_that_of_encode_at_any_length(model):
    embedder = Embedder(model, device="cpu")
    clips = [noise(seconds, seed) for seed, seconds in enumerate((2.3, 0.1, 0.64, 1.5))]
    expected = embedder.encoder.encode(clips, embedder.extractor, pooling="mean")
    assert torch.equal(embedder.embed_clips(clips), expected)
    both = Embedder(model, device="cpu", pooling="mean_and_std").embed_clips(clips)
    assert relative_difference(both[:, :WIDTH], expected) < 1e-5
    assert embedder.embed_clips([]).shape == (0, WIDTH)


def test_the_encoder_is_frozen(model):
    embedder = Embedder(model, device="cpu")
    assert not embedder.encoder.training
    assert not any(weight.requires_grad for weight in embedder.parameters())


def test_without_mteb_the_command_names_the_extra(model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mteb", None)
    assert cli.main(["benchmark", "--model", model, "--tasks", "ESC50"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("sslam benchmark: error: sslam benchmark needs mteb (")
    assert error.endswith("pip install 'transformers-sslam[mteb]'\n")


def test_arrays_and_tensors_are_the_same_clips(model):
    embedder, clip = Embedder(model, device="cpu"), noise(0.4)
    assert torch.equal(embedder.embed_clips([clip]), embedder.embed_clips([torch.from_numpy(np.array(clip))]))
