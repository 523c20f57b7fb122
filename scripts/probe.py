"""Linear probe on the mean patch tokens of a frozen encoder, against the same network untrained: each fold in turn is held out.

python scripts/probe.py model=runs/tiny/stage2/model data_dir=PATH/TO/esc10 fold_column=fold
"""

import sys
from dataclasses import dataclass

import datasets
import numpy as np
import torch
import transformers

from transformers_sslam import SSLAMFeatureExtractor, SSLAMModel
from transformers_sslam.data.labelled import (
    DatasetError,
    Waveforms,
    choose_classes,
    encode_labels,
    keep_rows,
    load_audio_folder,
    read_rows,
)
from transformers_sslam.evaluation.probing import linear_probe, mean_patch_embeddings
from transformers_sslam.training.settings import SettingsError, parse_settings, refusals_as_settings_errors, setting


@dataclass
class ProbeSettings:
    model: str = setting("checkpoint of the encoder, a folder or Hub id")
    data_dir: str = setting("folder of the clips, an 'audiofolder' of the datasets library")
    label_column: str = setting("column of the labels, one a clip", "label")
    fold_column: str = setting("column whose values are held out in turn", "fold")
    strength: float = setting("inverse of the L2 regularisation of the logistic regression", 1.0)
    seeds: list[int] = setting("of the untrained networks", [0, 1, 2])


def probe(settings: ProbeSettings) -> dict[str, dict[str, float]]:
    """Accuracy by fold, for the trained network and each untrained one."""
    with refusals_as_settings_errors(f"model {settings.model}"):
        extractor = SSLAMFeatureExtractor.from_pretrained(settings.model)
        models = {"trained": SSLAMModel.from_pretrained(settings.model, dtype=torch.float32)}
    for seed in settings.seeds:
        torch.manual_seed(seed)
        models[f"untrained, seed {seed}"] = SSLAMModel(models["trained"].config)

    clips = datasets.concatenate_datasets(list(load_audio_folder(settings.data_dir).values()))
    rows = read_rows(clips, settings.label_column)
    waveforms = Waveforms(rows.sources, extractor.sampling_rate)
    waveforms.check_unreadable(0.01, "probed")
    rows = keep_rows(rows, waveforms.kept)
    labels = encode_labels(rows, choose_classes(rows)).numpy()
    if settings.fold_column not in clips.column_names:
        raise DatasetError(f"there is no column {settings.fold_column!r}, only {', '.join(clips.column_names)}: name another")
    folds = np.array([str(fold) for fold in clips[settings.fold_column]])[waveforms.kept]

    accuracy = {}
    for name, model in models.items():
        features = mean_patch_embeddings(model, extractor, waveforms)
        accuracy[name] = {
            fold: linear_probe(
                features[folds != fold], labels[folds != fold], features[folds == fold], labels[folds == fold], settings.strength
            )
            for fold in sorted(set(folds))
        }
    return accuracy


def main() -> None:
    transformers.logging.disable_progress_bar()
    settings = parse_settings(ProbeSettings, __doc__)
    try:
        accuracy = probe(settings)
    except (DatasetError, SettingsError) as error:
        sys.exit(f"error: {error}")
    means = {name: float(np.mean(list(by_fold.values()))) for name, by_fold in accuracy.items()}
    for name, by_fold in accuracy.items():
        print(f"{name:20} {means[name]:.1%}  by fold: " + ", ".join(f"{fold} {value:.1%}" for fold, value in by_fold.items()))
    untrained = [mean for name, mean in means.items() if name != "trained"]
    print(f"gain: {100 * (means['trained'] - np.mean(untrained)):+.1f} points over the mean of {len(untrained)} untrained networks")


if __name__ == "__main__":
    main()
