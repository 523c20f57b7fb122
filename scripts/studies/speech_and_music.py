"""Tasks of mteb on speakers and instruments, alone and at once: classification, clustering, reranking and several labels, for
`sslam benchmark --tasks scripts/studies/speech_and_music.py`.

They read the folders `speakers` and `instruments` of scripts/studies/sets.py, and the mixtures `polyphonic_speakers` and
`polyphonic_instruments` that `sslam mix` made of them, below `runs`.
"""

from typing import Any

import datasets
from mteb.abstasks import AbsTaskClustering, AbsTaskMultilabelClassification, AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from sklearn.linear_model import LogisticRegression
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from transformers_sslam.audio import load_waveform
from transformers_sslam.audio.layouts import open_splits
from transformers_sslam.evaluation.adaptors.folds import FoldClassification


RATE = 16_000


def about(name: str, kind: Any, score: str) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        description=f"{kind} of sounds that are made by scripts/studies/sets.py",
        dataset={"path": "runs", "revision": "1"},
        type=kind,
        modalities=["audio"],
        eval_langs=["zxx-Zxxx"],
        main_score=score,
    )


def read_clips(folder: str, fold: int) -> datasets.Dataset:
    """Clips of one fold, decoded, with `id`, `audio` and `label`."""
    rows = open_splits(folder)["train"].cast_column("audio", datasets.Audio(decode=False))
    names = sorted(set(rows["label"]))
    rows = rows.filter(lambda row: int(row["fold"]) == fold)
    audio = [{"array": load_waveform(entry, RATE), "sampling_rate": RATE} for entry in rows["audio"]]
    numbers = [str(i) for i in range(len(rows))]
    return datasets.Dataset.from_dict({"id": numbers, "audio": audio, "label": [names.index(label) for label in rows["label"]]})


class Speakers(FoldClassification):
    """Whose voice says the prompt"""

    data_dir = "runs/speakers"


class Instruments(FoldClassification):
    """Which instrument plays the note"""

    data_dir = "runs/instruments"


class _Clustering(AbsTaskClustering):
    """Do clips of one fold come in clusters of one class?"""

    folder: str
    input_column_name = "audio"
    label_column_name = "label"
    max_fraction_of_documents_to_embed = None

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        self.dataset, self.data_loaded = datasets.DatasetDict(test=read_clips(self.folder, 4)), True


class SpeakersClustering(_Clustering):
    metadata, folder = about("SpeakersClustering", "AudioClustering", "v_measure"), "runs/speakers"


class InstrumentsClustering(_Clustering):
    metadata, folder = about("InstrumentsClustering", "AudioClustering", "v_measure"), "runs/instruments"


class _Reranking(AbsTaskRetrieval):
    """Each clip of fold 4 is a query, for which those of fold 3 with its label are relevant."""

    folder: str

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        queries, corpus = read_clips(self.folder, 4), read_clips(self.folder, 3)
        labelled = list(zip(corpus["id"], corpus["label"]))
        relevant = {query: {i: 1 for i, other in labelled if other == label} for query, label in zip(queries["id"], queries["label"])}
        every = list(corpus["id"])
        split: Any = {"queries": queries.remove_columns("label"), "corpus": corpus.remove_columns("label"), "relevant_docs": relevant}
        split["top_ranked"] = dict.fromkeys(queries["id"], every)
        self.dataset, self.data_loaded = {"default": {"test": split}}, True


class SpeakersReranking(_Reranking):
    metadata, folder = about("SpeakersReranking", "AudioReranking", "map_at_1000"), "runs/speakers"


class InstrumentsReranking(_Reranking):
    metadata, folder = about("InstrumentsReranking", "AudioReranking", "map_at_1000"), "runs/instruments"


class _Mixtures(AbsTaskMultilabelClassification):
    """Who or what sounds, of several at once?"""

    folder: str
    input_column_name = "audio"
    # mteb's own neighbours give 0 and 1 alone, of which a ranking has nothing to rank.
    evaluator_model = MultiOutputClassifier(make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)))

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        splits = {}
        for name, rows in open_splits(self.folder, "parquet").items():
            entries = rows.cast_column("audio", datasets.Audio(decode=False))["audio"]
            audio = [{"array": load_waveform(entry, RATE), "sampling_rate": RATE} for entry in entries]
            splits[name] = datasets.Dataset.from_dict({"audio": audio, "label": list(rows["labels"])})
        self.dataset, self.data_loaded = datasets.DatasetDict(splits), True


class SpeakersAtOnce(_Mixtures):
    metadata, folder = about("SpeakersAtOnce", "AudioMultilabelClassification", "lrap"), "runs/polyphonic_speakers"


class InstrumentsAtOnce(_Mixtures):
    metadata, folder = about("InstrumentsAtOnce", "AudioMultilabelClassification", "lrap"), "runs/polyphonic_instruments"
