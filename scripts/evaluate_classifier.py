"""What a trained classifier is worth on labelled clips: accuracy, or mean average precision, ROC AUC and d-prime, with 95 % intervals.

python scripts/evaluate_classifier.py model=runs/mine data_dir=PATH/TO/folder                      # its split test/
python scripts/evaluate_classifier.py model=sslam-base-as2m data_dir=audioset layout=audioset subset=eval label_column=labels
python scripts/evaluate_classifier.py model=runs/mine data_dir=esc10 fold_column=fold eval_folds='[4]'
python scripts/evaluate_classifier.py --help

The model's class names must be those of the clips' labels. The intervals are of the clips: they say what other clips, as many, would have
changed, not what another training would.
"""

import sys
from pathlib import Path

import transformers

from transformers_sslam.data.decoding import AudioDecodingError
from transformers_sslam.data.labelled import DatasetError
from transformers_sslam.evaluation.classifier import EvaluationSettings, evaluate_classifier, results_table
from transformers_sslam.settings import SettingsError, parse_settings


def main() -> None:
    transformers.logging.disable_progress_bar()
    settings = parse_settings(EvaluationSettings, __doc__)
    try:
        results = evaluate_classifier(settings)
    except (AudioDecodingError, DatasetError, SettingsError) as error:
        sys.exit(f"error: {error}")
    print(results_table(results))
    if silent := results["metrics"].get("classes_without_positives"):
        print(f"\nleft out, for no clip has them: {', '.join(silent)}")
    print(f"\nevery number is in {Path(settings.output_dir) / 'results.json'}, the logits in scores.npz there")


if __name__ == "__main__":
    main()
