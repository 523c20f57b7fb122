"""The command `probe`: the probes of `evaluation.frozen`, and the published linear protocol, fine-tuning with the encoder frozen.

```bash
sslam probe --model runs/tiny/stage2/model --data_dir PATH/TO/esc10                    # each fold held out in turn
sslam probe --model MODEL --data_dir PATH/TO/spass --layout spass --subset Park --fold_column null --label_column labels
sslam probe --model MODEL --data_dir PATH/TO/esc10 --layers all --probes linear_mean_and_std linear_max_by_frequency best_linear
sslam probe --model MODEL --data_dir PATH/TO/esc10 --probes published_linear --published.num_train_epochs 10
```

The table has accuracy, or mean average precision where clips have several labels: mean ± standard deviation [95 % interval] over folds,
each the mean of its seeds; without folds, over seeds. Beside the model are the same network untrained and, without a network, the log-mel,
under the same pooling. The published linear protocol is that of SSLAM (arXiv 2506.12222).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..evaluation.block_plot import PICTURE, replace_block_plot
from ..evaluation.frozen import PUBLISHED_LINEAR, FrozenSettings, evaluate_frozen, results_table
from ..evaluation.loading import prepare_command
from ..evaluation.probing import Partition
from ..evaluation.settings import make_folder
from ..files import lock, write_json
from ..settings import read_settings, setting
from .repeats import expand
from .settings import FineTuningSettings
from .training import fine_tune


# Settings that fine-tuning has under the same names.
SHARED = (
    *("model", "data_dir", "layout", "subset", "label_column", "label_separator", "fold_column", "train_split", "test_split"),
    *("max_unreadable", "max_length", "memory_gb", "per_device_eval_batch_size"),
)


@dataclass(kw_only=True)
class LinearProtocolSettings(FrozenSettings):
    """Published linear protocol"""

    published: dict[str, Any] = setting(f"settings of `sslam finetune` over its recipe {PUBLISHED_LINEAR}", {})


def run(settings: LinearProtocolSettings) -> None:
    """Run all probes, write `results.json`, and print a table."""
    prepare_command(settings.device)
    with lock(output := make_folder(settings.output_dir)):  # before hours of work
        results = evaluate_frozen(settings, lambda partitions: run_published_linear(settings, partitions))
        write_json(output / "results.json", results)
        print(results_table(results))
        print(f"\nevery number is in {output / 'results.json'}")
        if replace_block_plot(results, output):
            print(f"results by block are drawn in {output / PICTURE}")


def run_published_linear(settings: LinearProtocolSettings, partitions: Sequence[Partition]) -> np.ndarray:
    """Accuracy or mean average precision, `(partitions, seeds)`, of one fine-tuning run each, which leaves its model and results below
    `output_dir`."""
    shared = {name: value for name in SHARED if (value := getattr(settings, name)) is not None}
    folds = {} if settings.fold_column is None else {"cross_validate": True, "test_folds": [part.name for part in partitions]}
    own = {"output_dir": f"{settings.output_dir}/published", "overwrite_output_dir": True, "seeds": settings.seeds, **folds}
    runs = expand(read_settings(FineTuningSettings, PUBLISHED_LINEAR, {**shared, **own, **settings.published}))
    metrics = [fine_tune(one)["metrics"] for one in runs.values()]
    values = [found["accuracy" if "accuracy" in found else "mean_average_precision"] for found in metrics]
    return np.array(values).reshape(len(partitions), len(settings.seeds))
