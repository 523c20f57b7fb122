"""Pre-train SSLAM on streamed audio.

    accelerate launch scripts/pretrain.py scripts/recipes/pretrain_base_stage1.yaml output_dir=runs/stage1
    accelerate launch scripts/pretrain.py scripts/recipes/pretrain_base_stage2.yaml output_dir=runs/stage2 init_from=runs/stage1/model

Started again with the same output_dir, a run goes on from its latest whole checkpoint. Stopped by a signal, it writes one first, and ends
as a shell expects of it: with 130 after Ctrl-C, 143 after SIGTERM.
"""

import logging
import os
import sys

import transformers

from transformers_sslam.errors import UserError
from transformers_sslam.settings import parse_settings
from transformers_sslam.training.monitoring import CollapseError, NonFiniteError
from transformers_sslam.training.pretraining import PreTrainer
from transformers_sslam.training.pretraining_settings import PreTrainingSettings


def main() -> None:
    settings = parse_settings(PreTrainingSettings, __doc__)
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING  # before Accelerate knows the ranks
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    transformers.logging.disable_progress_bar()
    try:
        trainer = PreTrainer(settings)
        trainer.run()
    except (UserError, CollapseError, NonFiniteError, OSError) as error:
        sys.exit(f"error: {error}")
    if trainer.stop_signal is not None and trainer.update < settings.total_updates:
        sys.exit(128 + trainer.stop_signal)


if __name__ == "__main__":
    main()
