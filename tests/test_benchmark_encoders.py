"""`sslam benchmark` with other encoders than this package's, the baselines without training or network, and folders with folds."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise, speech_like, tiny_config

from transformers_sslam import SSLAMFeatureExtractor, SSLAMModel


mteb = pytest.importorskip("mteb")
pytest.importorskip("torchaudio")
import huggingface_hub.constants  # noqa: E402
import soundfile  # noqa: E402
from datasets import Dataset  # noqa: E402
from mteb.models.model_implementations import MODEL_REGISTRY  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import (  # noqa: E402
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

from transformers_sslam.cli import main  # noqa: E402
from transformers_sslam.errors import UserError  # noqa: E402
from transformers_sslam.evaluation.adaptors.benchmark import SuiteSettings, find_encoder, run_benchmark  # noqa: E402
from transformers_sslam.evaluation.frozen import FrozenSettings, evaluate_frozen  # noqa: E402


RATE = 16_000
AST, WAV2VEC2 = "MIT/ast-finetuned-audioset-10-10-0.4593", "facebook/wav2vec2-base"


def save_to_hub_cache(hub: Path, name: str, *parts) -> None:
    """Model and extractor in the Hub's cache, as the revision that mteb's list names."""
    revision = MODEL_REGISTRY[name].revision
    repository = hub / f"models--{name.replace('/', '--')}"
    for part in parts:
        part.save_pretrained(repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A cache of the Hub with AST and wav2vec2 under their names: small, with random weights."""
    folder = tmp_path_factory.mktemp("hub")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    ast = ASTModel(ASTConfig(**sizes, max_length=128))
    save_to_hub_cache(folder, AST, ast, ASTFeatureExtractor(max_length=128))
    convolutions = {"conv_dim": (16, 16), "conv_stride": (10, 8), "conv_kernel": (20, 8), "num_feat_extract_layers": 2}
    wav2vec2 = Wav2Vec2Model(Wav2Vec2Config(**sizes, **convolutions, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2))
    save_to_hub_cache(folder, WAV2VEC2, wav2vec2, Wav2Vec2FeatureExtractor())
    return folder


@pytest.fixture
def of_the_hub(hub, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(7)
    SSLAMModel(tiny_config(initializer_range=0.3)).save_pretrained(folder)
    SSLAMFeatureExtractor(max_length=64).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    """Three pitches in noise, 6 clips of .6 s in each of three folds, and two clips of another class in fold 9; with a file of tasks."""
    folder = tmp_path_factory.mktemp("sounds")
    generator = np.random.default_rng(0)
    rows = [(label, fold) for fold in "cab" for label in ("low", "middle", "high") for _ in range(6)] + [("other", "9")] * 2
    t = np.arange(round(0.6 * RATE)) / RATE
    with (folder / "metadata.csv").open("w") as table:
        writer = csv.writer(table)
        writer.writerow(["file_name", "label", "part"])
        for number, (label, fold) in enumerate(rows):
            frequency = {"low": 300, "middle": 450, "high": 675, "other": 2000}[label] * generator.uniform(0.75, 1.35)
            soundfile.write(folder / f"{number}.wav", 0.1 * np.sin(2 * np.pi * frequency * t) + noise(0.6, number), RATE)
            writer.writerow([f"{number}.wav", label, fold])
    return folder


def task_file(folder: Path, sounds: Path, *lines: str) -> str:
    path = folder / "tasks.py"
    attributes = [f"data_dir = {str(sounds)!r}", "fold_column = 'part'", *lines]
    head = ["from transformers_sslam.evaluation.adaptors.folds import FoldClassification", "", "class Pitches(FoldClassification):"]
    path.write_text("\n".join([*head, *(f"    {line}" for line in attributes)]))
    return str(path)


def settings(model: str, **options) -> SuiteSettings:
    return SuiteSettings(model=model, tasks=["ESC50"], device="cpu", **options)


def embed(encoder, waveforms: list[np.ndarray], batch_size: int = 1) -> np.ndarray:
    clips = Dataset.from_dict({"audio": [{"array": waveform, "sampling_rate": RATE} for waveform in waveforms]})
    about = {"task_metadata": mteb.get_task("ESC50").metadata, "hf_split": "test", "hf_subset": "default"}
    return np.asarray(encoder.encode(DataLoader(clips, batch_size), **about, show_progress_bar=False))


@torch.no_grad()
def test_models_of_the_suites_list_embed_as_their_networks_do(hub, of_the_hub):
    clip = speech_like(1.1)
    folders = [next((hub / f"models--{name.replace('/', '--')}" / "snapshots").iterdir()) for name in (AST, WAV2VEC2)]
    inputs = ASTFeatureExtractor.from_pretrained(folders[0])(clip, sampling_rate=RATE, return_tensors="pt")
    expected = ASTModel.from_pretrained(folders[0]).eval()(**inputs).pooler_output.numpy()
    np.testing.assert_allclose(embed(find_encoder(settings(AST)), [clip]), expected, atol=1e-5)
    inputs = Wav2Vec2FeatureExtractor.from_pretrained(folders[1])(clip, sampling_rate=RATE, return_tensors="pt")
    expected = Wav2Vec2Model.from_pretrained(folders[1]).eval()(**inputs).last_hidden_state.mean(1).numpy()
    np.testing.assert_allclose(embed(find_encoder(settings(WAV2VEC2)), [clip]), expected, atol=1e-5)


@pytest.mark.parametrize("model", [AST, WAV2VEC2, "log_mel"])
def test_the_command_takes_other_encoders_and_prints_the_mean_over_folds_with_its_interval(model, of_the_hub, sounds, tmp_path, capsys):
    tasks = task_file(tmp_path, sounds, "keep = {'part': ['a', 'b', 'c']}")
    words = ["--model", model, "--tasks", tasks, "--device", "cpu", "--output_dir", str(tmp_path / "out")]
    assert main(["benchmark", *words]) == 0
    (file,) = (tmp_path / "out").rglob("Pitches.json")
    (scores,) = json.loads(file.read_text())["scores"]["test"]
    by_fold = scores["scores_per_experiment"]
    assert [(score["fold"], score["clips"]) for score in by_fold] == [("a", 18), ("b", 18), ("c", 18)]
    assert scores["main_score"] == pytest.approx(np.mean([score["accuracy"] for score in by_fold]), abs=1e-5)
    assert scores["low"] < scores["main_score"] < scores["high"]
    printed = "{main_score:.4f} [{low:.4f}, {high:.4f}]".format(**scores)
    assert f"| Pitches | test | accuracy | {printed} |" in capsys.readouterr().out


def test_a_setting_that_has_no_effect_on_a_model_is_an_error(of_the_hub):
    for name, option, message in (
        (AST, {"pooling": "cls"}, f"pooling is 'cls', but {AST} is a model of mteb's list, which embeds as its authors chose"),
        (AST, {"untrained": True, "seed": 1}, f"untrained is True, but {AST} is a model of mteb's list"),
        (
            "log_mel",
            {"layers": [0]},
            r"layers is \[0\], but log_mel is the baseline without a network, where it has no effect: leave it out",
        ),
        ("log_mel", {"dtype": "float16"}, "dtype is 'float16', but log_mel is the baseline without a network"),
    ):
        with pytest.raises(UserError, match=message):
            find_encoder(settings(name, **option))
    with pytest.raises(UserError, match="seed is 3, but has no effect without untrained"):
        settings(AST, seed=3)


def test_a_model_that_cannot_be_loaded_or_does_not_exist_is_named_in_one_sentence(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    near = "of mteb's list, did you mean facebook/wav2vec2-base"
    for name, messages in (
        (AST, [f"{AST} of mteb's list cannot be loaded: "]),
        ("sentence-transformers/all-MiniLM-L6-v2", ["of mteb's list is a model of text, but audio is needed: choose another model"]),
        ("facebook/wav2vec2-bas", ["there is no folder or file facebook/wav2vec2-bas here", near]),
        ("runs/none", ["there is no folder or file runs/none here, and no model of this name", "(hf auth login)\n"]),
    ):
        assert main(["benchmark", "--model", name, "--tasks", "ESC50"]) == 1
        error = capsys.readouterr().err
        assert [message for message in messages if message not in error] == []
        assert error.count("\n") == 1


def test_a_folder_comes_before_a_model_of_the_list_with_its_name(tiny, of_the_hub, tmp_path, monkeypatch):
    (tmp_path / "MIT").mkdir()
    (tmp_path / AST).symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    assert embed(find_encoder(settings(AST, pooling="mean_and_std")), [noise(0.3)]).shape == (1, 64)


def test_the_log_mel_is_pooled_over_a_clips_own_frames_however_many(tiny):
    encoder, clips = find_encoder(settings("log_mel")), [noise(11.3), speech_like(0.031), noise(0.7, 1)]
    vectors = embed(encoder, clips, batch_size=3)
    assert vectors.shape == (3, 256)
    assert vectors.dtype == np.float32
    assert encoder.mteb_model_meta.n_parameters == 0
    assert encoder.mteb_model_meta.embed_dim == 256
    for clip, vector in zip(clips, vectors):
        options = {"sampling_rate": RATE, "padding": False, "truncation": False}
        frames = np.asarray(SSLAMFeatureExtractor()(clip, **options)["input_values"][0], dtype=np.float64)
        assert len(frames) == (len(clip) - 400) // 160 + 1
        np.testing.assert_allclose(vector, np.concatenate([frames.mean(0), frames.std(0)]), atol=1e-5)
        np.testing.assert_array_equal(vector, embed(encoder, [clip])[0])


def test_an_untrained_network_has_the_configuration_and_the_random_weights_of_its_seed(tiny):
    state = torch.get_rng_state()
    encoder = find_encoder(settings(tiny, untrained=True, seed=5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    expected = SSLAMModel(tiny_config(initializer_range=0.3)).state_dict()
    found = encoder.model.encoder.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert encoder.mteb_model_meta.experiment_name == "dtype_float32__layers_-1__pooling_mean__untrained_5"
    revisions = {find_encoder(settings(tiny, **options)).mteb_model_meta.revision for options in ({}, {"untrained": True})}
    assert len(revisions | {encoder.mteb_model_meta.revision}) == 3  # mteb keeps the results of each apart


@pytest.mark.parametrize("pooling", ["mean", "mean_and_std", None])
def test_a_folder_with_folds_scores_as_sslam_probe_on_it(pooling, tiny, sounds, tmp_path):
    """The probe of the same folder, its results by fold, the trained and the untrained network, and the log-mel."""
    kept = tmp_path / "kept"  # `sslam probe` has no setting for a part of the rows
    kept.mkdir()
    rows = (sounds / "metadata.csv").read_text().splitlines()[:-2]
    (kept / "metadata.csv").write_text("\n".join(rows) + "\n")
    for row in rows[1:]:
        (kept / row.split(",")[0]).symlink_to(sounds / row.split(",")[0])
    probe = f"linear_{pooling}" if pooling else "log_mel_statistics"
    data = {"data_dir": str(kept), "fold_column": "part", "seeds": [2]}
    folders = {"output_dir": str(tmp_path / "probe"), "cache_dir": str(tmp_path / "features")}
    (expected,) = evaluate_frozen(FrozenSettings(model=tiny, probes=[probe], device="cpu", **data, **folders))["probes"]
    task = task_file(tmp_path, sounds, "keep = {'label': ['low', 'middle', 'high']}")
    networks = {"trained": {}, "untrained": {"untrained": True, "seed": 2}} if pooling else {"trained": {}}
    for who, options in networks.items():
        out = tmp_path / who
        options |= {"pooling": pooling} if pooling else {}
        run_benchmark(SuiteSettings(model=tiny if pooling else "log_mel", tasks=[task], device="cpu", output_dir=str(out), **options))
        (file,) = out.rglob("Pitches.json")
        (scores,) = json.loads(file.read_text())["scores"]["test"]
        found = [[score["accuracy"]] for score in scores["scores_per_experiment"]]
        np.testing.assert_allclose(found, expected[who]["values"], atol=1e-5)  # mteb rounds to six digits
        assert 0.34 < scores["accuracy"] < 1  # neither chance nor perfect
        summary = expected[who]["summary"]
        assert [scores[name] for name in ("main_score", "low", "high")] == pytest.approx(
            [summary[n] for n in ("mean", "low", "high")], abs=1e-5
        )


def test_a_folder_that_cannot_be_held_out_by_folds_is_named_in_one_sentence(tiny, sounds, tmp_path, capsys):
    for line, message in (
        ("fold_column = 'fold'", "'fold'"),
        ("data_dir = 'none'", "there is no folder none"),
        ("keep = {'part': ['a']}", "to hold out each fold in turn, two are needed"),
        ("keep = {'part': ['a', 'x']}", "the column 'part' has no fold x"),
        ("keep = {}", "no training clip with 9 held out has the class other"),
        ("label_column = 'part'; fold_column = 'label'", "held out has the class"),
    ):
        tasks = task_file(tmp_path, sounds, line)
        words = ["--model", "log_mel", "--tasks", tasks, "--output_dir", str(tmp_path / "out")]
        assert main(["benchmark", *words]) == 1
        error = [text for text in capsys.readouterr().err.splitlines() if "error:" in text]
        assert len(error) == 1
        assert message in error[0]
