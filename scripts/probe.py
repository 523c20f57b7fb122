"""What a frozen encoder knows: probes on its features, against the same network untrained and against no network at all.

python scripts/probe.py model=runs/tiny/stage2/model data_dir=PATH/TO/esc10                     # each fold held out in turn
python scripts/probe.py model=MODEL data_dir=PATH/TO/spass layout=spass subset=Park fold_column=null label_column=labels
python scripts/probe.py model=MODEL data_dir=PATH/TO/esc10 probes='[published_linear]' published='[epochs=10]'
python scripts/probe.py --help

Accuracy, or mean average precision where clips have several labels: mean ± deviation [95 % interval] over folds, each the mean of its
seeds; without folds, over seeds. The published linear protocol is fine-tuning with the encoder frozen (SSLAM, arXiv 2506.12222).
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import transformers

from transformers_sslam.errors import UserError
from transformers_sslam.evaluation.features import ProbeError
from transformers_sslam.evaluation.frozen import FrozenSettings, evaluate_frozen, results_table
from transformers_sslam.evaluation.probing import Partition
from transformers_sslam.reports import write_json
from transformers_sslam.settings import parse_settings, read_settings, setting
from transformers_sslam.training.fine_tuning import FineTuningSettings, fine_tune


# As in recipes/linear_spass.yaml, for any data: length and statistics are the checkpoint's, exclusive classes have cross-entropy.
PUBLISHED_PROTOCOL = (
    *("freeze_encoder=true", "learning_rate=1e-3", "epochs=50", "warmup_share=0", "batch_size=48"),
    *("augmentation.mixup_alpha=0.8", "augmentation.mixup_probability=0.9"),
    *("augmentation.time_mask=0.2", "augmentation.frequency_mask=0.2", "model_config.drop_path_rate=0.1"),
)
SHARED = (
    *("model", "data_dir", "layout", "subset", "label_column", "label_separator", "fold_column", "train_split", "eval_split"),
    *("max_unreadable", "max_length", "memory_gb"),
)


@dataclass(kw_only=True)
class Settings(FrozenSettings):
    published: list[str] = setting("changes to the published protocol: settings of scripts/finetune.py as key=value", [])


def run_published_protocol(settings: Settings, partitions: Sequence[Partition]) -> np.ndarray:
    """One fine-tuning run each, `(partitions, seeds)`, which leaves its model and results below `output_dir`."""
    shared = [f"{name}={value}" for name in SHARED if (value := getattr(settings, name)) is not None]
    values = np.empty((len(partitions), len(settings.seeds)))
    for row, partition in enumerate(partitions):
        for column, seed in enumerate(settings.seeds):
            own = [f"output_dir={settings.output_dir}/published/{partition.name}-seed-{seed}", f"seed={seed}", "overwrite=true"]
            if settings.fold_column is not None:
                others = [other.name for other in partitions if other is not partition]
                own += [f"train_folds={json.dumps(others)}", f"eval_folds={json.dumps([partition.name])}"]
            run = read_settings(FineTuningSettings, None, [*PUBLISHED_PROTOCOL, *shared, *own, *settings.published])
            metrics = fine_tune(run)["metrics"]
            values[row, column] = metrics["accuracy" if "accuracy" in metrics else "mean_average_precision"]
    return values


def main() -> None:
    transformers.logging.disable_progress_bar()
    try:
        settings = parse_settings(Settings, __doc__)
        results = evaluate_frozen(settings, run_published_protocol)  # type: ignore[arg-type]  # it is given these settings
    except (UserError, ProbeError) as error:
        sys.exit(f"error: {error}")
    output = Path(settings.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "results.json", results)
    print(results_table(results))
    print(f"\nevery number is in {output / 'results.json'}")


if __name__ == "__main__":
    main()
