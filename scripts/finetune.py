"""Fine-tune a SSLAM classifier on a labelled folder of audio.

python scripts/finetune.py scripts/recipes/finetune_esc10.yaml data_dir=PATH/TO/esc10
python scripts/finetune.py data_dir=my_sounds model=PATH_OR_HUB_ID output_dir=runs/mine
python scripts/finetune.py --help
"""

import sys

from transformers_sslam.data.labelled import DatasetError
from transformers_sslam.training.fine_tuning import FineTuningSettings, fine_tune
from transformers_sslam.training.settings import SettingsError, parse_settings


def main() -> None:
    settings = parse_settings(FineTuningSettings, __doc__)
    try:
        results = fine_tune(settings)
    except (DatasetError, SettingsError) as error:
        sys.exit(f"error: {error}")
    for name, value in results["metrics"].items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    clips, seconds = results["clips"], results["seconds"]["total"]
    print(f"{clips['training']} training clips, {clips['evaluation']} evaluation clips, {seconds:.0f} s; saved in {settings.output_dir}")


if __name__ == "__main__":
    main()
