"""`sslam finetune` as a script, for `accelerate launch scripts/finetune.py --config RECIPE ...`."""

import sys

from transformers_sslam.cli import main


if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
