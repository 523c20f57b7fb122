"""The command `finetune`: a classifier on labelled clips, trained once, or over folds and seeds.

```bash
sslam finetune --model MODEL --data_dir PATH/TO/folder --output_dir runs/mine             # its splits train/ and test/
sslam finetune --config finetune_esc10 --data_dir PATH/TO/esc10
sslam finetune --model MODEL --data_dir PATH/TO/folder --fold_column fold --cross_validate --seeds 0 1 2
```

An interrupted run resumes, if the same command is given again, from its last checkpoint.
"""

import logging
import sys
from pathlib import Path

import transformers
from accelerate import PartialState

from ..allocator import keep_freed_memory
from ..distributed import leave_process_group
from ..evaluation.per_class import PICTURE, class_table
from .repeats import format_runs, repeat_fine_tuning
from .settings import FineTuningSettings


def run(settings: FineTuningSettings) -> None:
    """Run all folds and seeds, and print tables of their metrics and of the classes.

    Raises:
        UserError: see [`repeat_fine_tuning`].
        SystemExit: after Ctrl-C, with status 130, as a shell expects.
    """
    device = settings.training_arguments().device
    main = PartialState().is_main_process
    logging.basicConfig(level=logging.INFO if main else logging.WARNING, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request to the Hub
    transformers.logging.disable_progress_bar()  # of loading and saving: those of training and evaluation are others
    if device.type == "cpu":
        keep_freed_memory()
    try:
        summary = repeat_fine_tuning(settings)
    except KeyboardInterrupt:
        print("stopped: the same command resumes this run from its last checkpoint, and does not repeat finished ones", file=sys.stderr)
        raise SystemExit(130) from None
    leave_process_group()
    if main:
        print("\n" + format_runs(summary))
        if summary["per_class"]:
            print("\n" + class_table(summary["per_class"]))
        if (picture := Path(settings.output_dir) / PICTURE).exists():
            print(f"\nconfusion matrix: {picture}")
        print(f"\n{summary['seconds']:.0f} s; models and results in {settings.output_dir}, the table's numbers in summary.json there")
