"""`sslam pretrain` as a script, for `accelerate launch scripts/pretrain.py --config RECIPE ...`."""

import sys

from transformers_sslam.cli import main


if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
