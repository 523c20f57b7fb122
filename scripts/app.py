import sys

from transformers_sslam.cli import main


if __name__ == "__main__":
    sys.exit(main(["app", *sys.argv[1:]]))
