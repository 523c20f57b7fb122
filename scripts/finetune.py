"""Fine-tune a SSLAM classifier on labelled audio: once, or over folds and seeds.

python scripts/finetune.py scripts/recipes/finetune_esc10.yaml data_dir=PATH/TO/esc10
python scripts/finetune.py data_dir=my_sounds model=PATH_OR_HUB_ID output_dir=runs/mine
python scripts/finetune.py data_dir=my_sounds fold_column=fold cross_validate=true 'seeds=[0,1,2]'
python scripts/finetune.py --help
"""

import logging
import os
import sys

from accelerate import PartialState

from transformers_sslam.errors import AudioDecodingError, UserError
from transformers_sslam.settings import parse_settings
from transformers_sslam.training.fine_tuning_settings import FineTuningSettings
from transformers_sslam.training.repeats import format_runs, repeat_fine_tuning


def main() -> None:
    settings = parse_settings(FineTuningSettings, __doc__)
    logging.basicConfig(level=logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request to the Hub
    try:
        summary = repeat_fine_tuning(settings)
    except (AudioDecodingError, UserError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped: started again, this run resumes from its last checkpoint, and finished runs are found again", file=sys.stderr)
        sys.exit(130)
    PartialState().destroy_process_group()  # whose threads may abort a process that just ends
    if os.environ.get("RANK", "0") != "0":
        return
    print(format_runs(summary))
    print(f"\n{summary['seconds']:.0f} s; models and results in {settings.output_dir}, the table's numbers in summary.json there")


if __name__ == "__main__":
    main()
