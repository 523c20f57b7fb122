"""Linear probe on the mean patch tokens of a frozen encoder, against the same network untrained.

python scripts/probe.py model=runs/tiny/stage2/model data_dir=PATH/TO/esc10 fold_column=fold train_folds=[1,2,3] eval_folds=[4]
"""

import json
import sys
from dataclasses import dataclass

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
    select_folds,
)
from transformers_sslam.evaluation.probing import linear_probe, mean_patch_embeddings
from transformers_sslam.training.settings import SettingsError, parse_settings, refusals_as_settings_errors, setting


@dataclass(kw_only=True)
class ProbeSettings:
    model: str = setting("checkpoint of the encoder, a folder or Hub id")
    data_dir: str = setting("folder of the clips, an 'audiofolder' of the datasets library")
    label_column: str = setting("column of the labels, one a clip", "label")
    fold_column: str = setting("column to choose rows by", "fold")
    train_folds: list[int | str] = setting("its values to fit the classifier on")
    eval_folds: list[int | str] = setting("its values to evaluate on")
    strength: float = setting("inverse of the L2 regularisation of the logistic regression", 1.0)
    seed: int = setting("of the untrained network", 0)


def probe(settings: ProbeSettings) -> dict[str, float]:
    with refusals_as_settings_errors(f"model {settings.model}"):
        extractor = SSLAMFeatureExtractor.from_pretrained(settings.model)
        trained = SSLAMModel.from_pretrained(settings.model, dtype=torch.float32)
    torch.manual_seed(settings.seed)
    models = {"trained": trained, "untrained": SSLAMModel(trained.config)}

    splits, parts = load_audio_folder(settings.data_dir), []
    for folds in (settings.train_folds, settings.eval_folds):
        rows = read_rows(select_folds(splits, settings.fold_column, folds), settings.label_column)
        waveforms = Waveforms(rows.sources, extractor.sampling_rate)
        waveforms.check_unreadable(0.01, "probed")
        parts.append((keep_rows(rows, waveforms.kept), list(waveforms)))
    classes = choose_classes(parts[0][0])
    labels = [encode_labels(rows, classes).numpy() for rows, _ in parts]

    accuracy = {}
    for name, model in models.items():
        train, evaluation = (mean_patch_embeddings(model, extractor, waveforms) for _, waveforms in parts)
        accuracy[name] = linear_probe(train, labels[0], evaluation, labels[1], settings.strength)
    return accuracy


def main() -> None:
    transformers.logging.disable_progress_bar()
    settings = parse_settings(ProbeSettings, __doc__)
    try:
        accuracy = probe(settings)
    except (DatasetError, SettingsError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(accuracy))
    gain = accuracy["trained"] - accuracy["untrained"]
    print(f"linear probe: {accuracy['trained']:.1%}, untrained {accuracy['untrained']:.1%}, gain {100 * gain:+.1f} points")


if __name__ == "__main__":
    main()
