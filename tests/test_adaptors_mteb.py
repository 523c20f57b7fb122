"""mteb: its tasks on local clips, without a network, and their scores beside those of this package's own probes."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise, speech_like, tiny_config

from transformers_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMModel


mteb = pytest.importorskip("mteb")
pytest.importorskip("torchaudio")
from datasets import Dataset, DatasetDict  # noqa: E402
from mteb.abstasks import (  # noqa: E402
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskMultilabelClassification,
    AbsTaskRetrieval,
)
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.models.abs_encoder import AbsEncoder  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchaudio.functional import resample  # noqa: E402

from transformers_sslam.audio.decode import load_waveform  # noqa: E402
from transformers_sslam.cli import main  # noqa: E402
from transformers_sslam.errors import UserError  # noqa: E402
from transformers_sslam.evaluation.adaptors.benchmark import SuiteSettings  # noqa: E402
from transformers_sslam.evaluation.adaptors.folds import FoldClassification  # noqa: E402
from transformers_sslam.evaluation.adaptors.mteb import LogMelEncoder, SSLAMEncoder, official_models  # noqa: E402
from transformers_sslam.evaluation.features import encode_clips  # noqa: E402
from transformers_sslam.evaluation.loading import load_model  # noqa: E402
from transformers_sslam.evaluation.probing import hold_out_each, run_probe  # noqa: E402


RATE = 16_000
SMALL_MODEL = str(Path(__file__).parents[1] / "model_cards" / "sslam-tiny-esc10")


class Clips:
    """Labelled clips, each in the part "train" or "test"."""

    def __init__(self, waveforms: list[np.ndarray], labels: list[int], parts: list[str]):
        self.waveforms, self.labels, self.parts = waveforms, np.array(labels), np.array(parts)

    def rows(self, part: str) -> list[int]:
        return np.flatnonzero(self.parts == part).tolist()

    def dataset(self, rows: list[int]) -> Dataset:
        audio = [{"array": self.waveforms[i], "sampling_rate": RATE} for i in rows]
        return Dataset.from_dict({"id": [str(i) for i in rows], "audio": audio, "label": self.labels[rows].tolist()})


def metadata(kind: str, main_score: str) -> TaskMetadata:
    where = {"path": "local", "revision": "1"}
    return TaskMetadata(
        name=f"Local{kind}",
        description="clips of a test",
        dataset=where,
        type=kind,
        modalities=["audio"],
        eval_langs=["zxx-Zxxx"],
        main_score=main_score,
    )


class LocalTask:
    """A task whose clips are given to it."""

    input_column_name = "audio"

    def __init__(self, clips: Clips):
        super().__init__()
        self.clips, self.data_loaded = clips, True
        self.dataset = DatasetDict({part: clips.dataset(clips.rows(part)) for part in ("train", "test")})


class Classification(LocalTask, AbsTaskClassification):
    metadata = metadata("AudioClassification", "accuracy")


class Folds(FoldClassification):
    """Both parts are held out in turn."""

    def __init__(self, clips: Clips):
        super().__init__()
        self.dataset, self.folds, self.data_loaded = DatasetDict(test=clips.dataset(range(len(clips.parts)))), clips.parts.tolist(), True


class Multilabel(LocalTask, AbsTaskMultilabelClassification):
    metadata = metadata("AudioMultilabelClassification", "lrap")


class Clustering(LocalTask, AbsTaskClustering):
    metadata = metadata("AudioClustering", "v_measure")
    label_column_name = "label"
    max_fraction_of_documents_to_embed = None


class Reranking(LocalTask, AbsTaskRetrieval):
    """Each test clip is a query. Of all training clips those of its class are relevant."""

    metadata = metadata("AudioReranking", "map_at_1000")

    def __init__(self, clips: Clips):
        super().__init__(clips)
        queries, corpus = (clips.dataset(clips.rows(part)).remove_columns("label") for part in ("test", "train"))
        candidates = {i: list(corpus["id"]) for i in queries["id"]}
        relevant = {str(i): {str(j): 1 for j in clips.rows("train") if clips.labels[i] == clips.labels[j]} for i in clips.rows("test")}
        split = {"queries": queries, "corpus": corpus, "relevant_docs": relevant, "top_ranked": candidates}
        self.dataset = {"default": {"test": split}}


@pytest.fixture(scope="module")
def tones() -> Clips:
    """Four pitches in noise, 15 clips of each, of .2 to 1.6 s."""
    generator = np.random.default_rng(0)
    waveforms, labels, parts = [], [], []
    for label, frequency in enumerate((220, 440, 880, 1760)):
        for i in range(15):
            seconds = generator.uniform(0.2, 1.6)
            t = np.arange(round(seconds * RATE)) / RATE
            tone = np.sin(2 * np.pi * frequency * generator.uniform(0.8, 1.25) * t)
            waveforms.append((0.05 * tone + 0.1 * generator.standard_normal(len(t))).astype(np.float32))
            labels.append(label)
            parts.append("train" if i < 10 else "test")
    return Clips(waveforms, labels, parts)


@pytest.fixture(scope="module")
def esc() -> Clips:
    """Two seconds of 4 clips of each class and fold, of two folds of ESC-18: the classes of ESC-50 that the shared part has whole."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "esc"
    if not folder.is_dir():
        pytest.skip("needs ../shared (real audio), which is not part of the repository")
    rows = list(csv.DictReader((folder / "metadata.csv").open()))
    counts = Counter(row["label"] for row in rows)
    names = sorted(name for name, count in counts.items() if count == 32)
    groups = [[row for row in rows if (row["label"], row["fold"]) == (name, fold)] for name in names for fold in "12"]
    chosen = [row for group in groups for row in group[:4]]
    waveforms = [load_waveform(folder / row["file_name"])[: 2 * RATE] for row in chosen]
    return Clips(waveforms, [names.index(row["label"]) for row in chosen], [{"1": "train", "2": "test"}[row["fold"]] for row in chosen])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """Untrained, 64 frames a window, so that some clips have several."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    SSLAMModel(tiny_config(initializer_range=0.3)).save_pretrained(folder)
    SSLAMFeatureExtractor(max_length=64).save_pretrained(folder)
    return str(folder)


def evaluate(encoder: SSLAMEncoder, task) -> dict:
    """The scores of a task; no results of other runs are taken, and none are kept."""
    (result,) = mteb.evaluate(encoder, task, cache=None, show_progress_bar=False).task_results
    (scores,) = result.scores["test"]
    return scores


def embed(encoder: SSLAMEncoder, waveforms: list[np.ndarray], batch_size: int = 1, rate: int = RATE) -> np.ndarray:
    dataset = Dataset.from_dict({"audio": [{"array": waveform, "sampling_rate": rate} for waveform in waveforms]})
    return encoder.encode(DataLoader(dataset, batch_size), batch_size=batch_size, show_progress_bar=False)


def largest_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def check_against_the_probe(clips: Clips, encoder: AbsEncoder, probe: str) -> None:
    """By fold, mteb's accuracy is that of this package's probe, because `FoldClassification` fits the same classifier."""
    model, extractor = load_model(SSLAMModel, SMALL_MODEL, device="cpu")
    features = encode_clips(model, extractor, clips.waveforms, keep_patches=False)
    partitions = hold_out_each(clips.parts.tolist())
    expected = run_probe(probe, features, clips.labels, partitions)[:, 0]
    assert expected.min() > 0.3  # neither chance nor perfect, which other embeddings would reach too
    assert expected.mean() < 1
    scores = evaluate(encoder, Folds(clips))
    assert [score["fold"] for score in scores["scores_per_experiment"]] == [part.name for part in partitions]
    assert [score["accuracy"] for score in scores["scores_per_experiment"]] == pytest.approx(expected.tolist(), abs=1e-12)
    assert scores["main_score"] == pytest.approx(expected.mean(), abs=1e-12)


@pytest.mark.parametrize(("pooling", "probe"), [("cls", "linear_cls"), ("mean", "linear_mean"), ("mean_and_std", "linear_mean_and_std")])
def test_a_classification_task_scores_as_the_probe_of_this_package(tones, pooling, probe):
    check_against_the_probe(tones, SSLAMEncoder(SMALL_MODEL, device="cpu", pooling=pooling), probe)


def test_a_classification_task_scores_as_the_probe_on_recorded_sounds(esc):
    check_against_the_probe(esc, SSLAMEncoder(SMALL_MODEL, device="cpu"), "linear_mean")


@pytest.mark.parametrize("clips", ["tones", "esc"])
def test_the_log_mel_without_a_network_scores_as_the_probe_of_its_statistics(clips, request):
    check_against_the_probe(request.getfixturevalue(clips), LogMelEncoder(), "log_mel_statistics")


def mixtures(clips: Clips) -> Clips:
    """Sums of two clips of different classes, each clip in two of them, with both labels; the shorter clip begins with the longer one."""
    waveforms, labels, parts = [], [], []
    for part in ("train", "test"):
        rows = clips.rows(part)
        for shift in (1, 2):
            of_class = [[i for i in rows if clips.labels[i] == label] for label in sorted(set(clips.labels.tolist()))]
            for first, second in zip(of_class, of_class[shift:] + of_class[:shift]):
                for pair in zip(first, second):
                    longest = max(len(clips.waveforms[i]) for i in pair)
                    waveforms.append(sum(np.pad(clips.waveforms[i], (0, longest - len(clips.waveforms[i]))) for i in pair))
                    labels.append(clips.labels[list(pair)].tolist())
                    parts.append(part)
    return Clips(waveforms, labels, parts)


@pytest.mark.parametrize("clips", ["tones", "esc"])
def test_a_multi_label_task_of_mixtures_scores_above_vectors_of_noise(clips, request):
    mixed = mixtures(request.getfixturevalue(clips))
    assert len(mixed.parts) in (2 * 60, 2 * 144)
    encoder = SSLAMEncoder(SMALL_MODEL, device="cpu")
    scores = evaluate(encoder, Multilabel(mixed))
    encoder.encode = lambda inputs, **_: np.random.default_rng(0).standard_normal((len(inputs.dataset), 8))
    chance = evaluate(encoder, Multilabel(mixed))
    assert scores["f1"] > 1.4 * chance["f1"]
    assert scores["main_score"] > chance["lrap"] + 0.1


@pytest.mark.parametrize("clips", ["tones", "esc"])
def test_classification_clustering_and_reranking_run_and_beat_chance(clips, request):
    clips = request.getfixturevalue(clips)
    encoder = SSLAMEncoder(SMALL_MODEL, device="cpu")
    classes = len(set(clips.labels.tolist()))
    assert evaluate(encoder, Classification(clips))["main_score"] > 1.5 / classes
    assert evaluate(encoder, Clustering(clips))["main_score"] > 0.2
    assert evaluate(encoder, Reranking(clips))["main_score"] > 1.5 / classes  # a random order has a little over 1 / classes


@pytest.mark.parametrize("pooling", ["cls", "mean", "mean_and_std"])
def test_an_embedding_does_not_depend_on_what_a_clip_is_batched_with(tiny, pooling):
    encoder = SSLAMEncoder(tiny, device="cpu", pooling=pooling, layers=[1, -1])
    waveforms = [noise(2.3), speech_like(0.03), noise(0.4, seed=1), speech_like(1.7), noise(0.7, seed=2)]
    alone, together = embed(encoder, waveforms), embed(encoder, waveforms, batch_size=5)
    assert alone.shape == (5, 2 * 32 * (2 if pooling == "mean_and_std" else 1))
    assert alone.dtype == np.float32
    assert largest_difference(together, alone) < 1e-5
    assert largest_difference(embed(encoder, waveforms[::-1], batch_size=3)[::-1], alone) < 1e-5
    assert largest_difference(alone[0], alone[1]) > 0.1  # the clips differ


def test_audio_at_other_rates_in_other_layouts_and_shorter_than_a_frame_is_prepared_by_the_collator_of_mteb(tiny):
    encoder = SSLAMEncoder(tiny, device="cpu")
    high = speech_like(0.5, 44_100)
    resampled = resample(torch.from_numpy(high), 44_100, RATE).numpy()
    assert largest_difference(embed(encoder, [high], rate=44_100), embed(encoder, [resampled])) < 1e-4
    clip = noise(0.5)
    expected = embed(encoder, [clip])
    assert largest_difference(embed(encoder, [clip[None]]), expected) < 1e-5  # (1, samples)
    assert largest_difference(embed(encoder, [np.stack((1.5 * clip, 0.5 * clip))]), expected) < 1e-5
    assert largest_difference(embed(encoder, [clip[:100]]), embed(encoder, [np.pad(clip[:100], (0, 300))])) < 1e-5


def test_clips_that_cannot_be_encoded_and_tasks_of_text_are_errors(tiny):
    encoder = SSLAMEncoder(tiny, device="cpu")
    with pytest.raises(ValueError, match="not finite|NaN"):
        embed(encoder, [np.full(RATE, np.nan, np.float32)])
    with pytest.raises(ValueError, match="the task has the columns text, but this model encodes audio alone"):
        encoder.encode(DataLoader(Dataset.from_dict({"text": ["rain"]})))


def test_what_mteb_knows_of_a_model_follows_from_its_weights(tiny, tmp_path):
    meta = SSLAMEncoder(tiny, device="cpu", pooling="mean_and_std").mteb_model_meta
    model = SSLAMModel.from_pretrained(tiny)
    assert meta.name == f"local/{Path(tiny).name}"
    assert meta.n_parameters == sum(weight.numel() for weight in model.parameters())
    assert meta.embed_dim == 64
    assert meta.experiment_name == "dtype_float32__layers_-1__pooling_mean_and_std"
    with torch.no_grad():
        model.layers[0].mlp.fc1.weight[0, 0] += 1
    model.save_pretrained(tmp_path / Path(tiny).name)
    SSLAMFeatureExtractor(max_length=64).save_pretrained(tmp_path / Path(tiny).name)
    changed = SSLAMEncoder(str(tmp_path / Path(tiny).name), device="cpu").mteb_model_meta
    assert changed.name == meta.name
    assert changed.revision != meta.revision


def test_official_entries_have_the_sizes_of_their_configurations():
    entries = {meta.name: meta for meta in official_models()}
    assert len(entries) == 5
    for name, card in (("ta012/SSLAM_pretrain", "sslam-base"), ("worstchan/EAT-large_epoch20_pretrain", "eat-large")):
        config = SSLAMConfig.from_pretrained(SMALL_MODEL.replace("sslam-tiny-esc10", card))
        width, depth, mlp = config.hidden_size, config.num_hidden_layers, config.intermediate_size
        block = 4 * width * width + 2 * width * mlp + 9 * width + mlp  # weights; biases of 5 layers and two norms
        patches = config.patch_size**2 * width + width
        meta = entries[name]
        assert meta.n_parameters == depth * block + patches + 3 * width  # CLS token and a norm
        assert meta.embed_dim == width
        assert meta.memory_usage_mb == round(meta.n_parameters * 4 / 2**20)
        assert meta.revision is None
        assert meta.modalities == ["audio"]
        for task in meta.training_datasets:
            assert mteb.get_task(task).metadata.name == task


def test_an_official_entry_loads_by_its_name_and_revision(tiny, monkeypatch):
    asked = []

    def download(name, revision):
        asked.append((name, revision))
        return tiny

    monkeypatch.setattr("transformers_sslam.evaluation.adaptors.mteb.snapshot_download", download)
    entry = official_models()[0].model_copy(update={"revision": "abc"})
    encoder = entry.load_model(device="cpu", pooling="cls")
    assert asked == [("ta012/SSLAM_pretrain", "abc")]
    assert encoder.model.pooling == "cls"
    assert encoder.mteb_model_meta.revision == "abc"


TASKS = """
import numpy as np
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskClassification
from mteb.abstasks.task_metadata import TaskMetadata


def clips(seed):
    generator = np.random.default_rng(seed)
    rows = [(label, generator.standard_normal(8000) * (0.01 + label)) for label in (0, 1) for _ in range(8)]
    audio = [{"array": waveform, "sampling_rate": 16_000} for _, waveform in rows]
    return Dataset.from_dict({"audio": audio, "label": [label for label, _ in rows]})


class Loudness(AbsTaskClassification):
    metadata = TaskMetadata(
        name="Loudness",
        description="quiet or loud noise",
        dataset={"path": "local", "revision": "1"},
        type="AudioClassification",
        modalities=["MODALITY"],
        eval_langs=["zxx-Zxxx"],
        main_score="accuracy",
    )
    input_column_name = "audio"

    def load_data(self, **kwargs):
        self.dataset = DatasetDict(train=clips(0), test=clips(1))
        self.data_loaded = True
"""


def test_the_command_runs_tasks_of_ones_own(tmp_path, capsys):
    (tmp_path / "tasks.py").write_text(TASKS.replace("MODALITY", "audio"))
    words = ["--suite", "mteb", "--model", SMALL_MODEL, "--tasks", str(tmp_path / "tasks.py"), "--device", "cpu"]
    assert main(["benchmark", *words, "--output_dir", str(tmp_path / "out"), "--pooling", "cls", "--layers", "2", "4"]) == 0
    assert "| Loudness | test | accuracy | 1.0000 |" in capsys.readouterr().out
    (file,) = (tmp_path / "out").rglob("Loudness.json")
    assert file.parent.name == "dtype_float32__layers_2 4__pooling_cls"
    assert json.loads(file.read_text())["scores"]["test"][0]["main_score"] == 1.0


def test_a_task_that_is_not_found_or_not_of_audio_is_named_in_one_sentence(tmp_path, capsys):
    (tmp_path / "text.py").write_text(TASKS.replace("MODALITY", "text"))
    for name, content in (("empty", ""), ("syntax", "class X(:"), ("imports", "import nothing_of_this_name")):
        (tmp_path / f"{name}.py").write_text(content)
    for tasks, message in (
        ("ESC5", "there is no task or benchmark 'ESC5' in mteb, nor is it a Python file: "),
        (str(tmp_path / "none.py"), "none.py: give a Python file that defines tasks"),
        (str(tmp_path / "empty.py"), "empty.py defines no task: write a class"),
        (str(tmp_path / "syntax.py"), "syntax.py is not Python that can be run here (invalid syntax (syntax.py, line 1)): correct it"),
        (str(tmp_path / "imports.py"), "(No module named 'nothing_of_this_name'): correct it, or install what it imports"),
        (str(tmp_path / "text.py"), "Loudness is a task of text, but the model encodes audio alone"),
        ("[]", "tasks is empty, but at least one task is needed"),
    ):
        assert main(["benchmark", "--model", SMALL_MODEL, "--tasks", tasks, "--output_dir", str(tmp_path / "out")]) in (1, 2)
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    with pytest.raises(UserError, match="per_device_eval_batch_size is 0, but must be positive"):
        SuiteSettings(model="m", tasks=["t"], per_device_eval_batch_size=0)


def test_an_unknown_embedding_is_an_error(tiny):
    with pytest.raises(UserError, match="pooling is 'max', but one of cls, mean, mean_and_std, max_by_frequency, .* is expected"):
        SSLAMEncoder(tiny, device="cpu", pooling="max")
    with pytest.raises(UserError, match=r"layers is \[3\], but numbers from -3 to 2 are expected"):
        SSLAMEncoder(tiny, device="cpu", layers=[3])
