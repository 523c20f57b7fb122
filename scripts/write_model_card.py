"""Write README.md of folders that hold config.json, preprocessor_config.json and results.json, a description of the model.

python scripts/write_model_card.py model_cards/*/
"""

import argparse
import sys

from transformers_sslam.model_cards import CardError, generate_model_card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="folder")
    try:
        for folder in parser.parse_args().folders:
            print(generate_model_card(folder))
    except CardError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
