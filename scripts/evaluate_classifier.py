"""What a trained classifier is worth on labelled clips: accuracy, or mean average precision, ROC AUC and d-prime, with 95 % intervals.

python scripts/evaluate_classifier.py model=runs/mine data_dir=PATH/TO/folder                      # its split test/
python scripts/evaluate_classifier.py model=sslam-base-as2m data_dir=audioset layout=audioset subset=eval label_column=labels
python scripts/evaluate_classifier.py model=runs/mine data_dir=esc10 fold_column=fold eval_folds='[4]'
python scripts/evaluate_classifier.py --help

The clips must be others than those it was trained on, and their labels called as the model's classes. The intervals are of the clips:
they say what other clips, as many, would have changed, not what another training would.
"""

import sys
from pathlib import Path

import transformers

from transformers_sslam.errors import AudioDecodingError, UserError
from transformers_sslam.evaluation.classifier import EvaluationSettings, evaluate_classifier, results_table
from transformers_sslam.settings import parse_settings


def main() -> None:
    transformers.logging.disable_progress_bar()
    settings = parse_settings(EvaluationSettings, __doc__)
    try:
        results = evaluate_classifier(settings)
    except (AudioDecodingError, UserError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    print(results_table(results))
    for kind, whose in (("positives", "no clip"), ("negatives", "every clip")):
        if left_out := results["metrics"].get(f"classes_without_{kind}"):
            print(f"\nleft out, for {whose} has them: {', '.join(left_out)}")
    print(f"\nevery number is in {Path(settings.output_dir) / 'results.json'}, the logits in scores.npz there")


if __name__ == "__main__":
    main()
