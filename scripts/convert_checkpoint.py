"""Convert an official SSLAM or EAT checkpoint (fairseq .pt, Hub folder or Hub id) to a folder that `from_pretrained` loads.

python scripts/convert_checkpoint.py SSLAM_Pretrained.pt sslam-base
python scripts/convert_checkpoint.py ta012/SSLAM_AS2M_Finetuned sslam-base-as2m --labels class_labels_indices.csv
"""

import argparse
import sys

from transformers_sslam import NORMALIZATION_PRESETS
from transformers_sslam.conversion import ConversionError, convert_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a fairseq .pt file, a folder with config.json and model.safetensors, or a Hub id")
    parser.add_argument("output_dir", help="a new folder, or an empty one")
    parser.add_argument(
        "--labels", metavar="CSV", help="class names: columns index and display_name, as in AudioSet's class_labels_indices.csv"
    )
    parser.add_argument(
        "--preset", choices=sorted(NORMALIZATION_PRESETS), help="normalisation; by default what the checkpoint was trained for"
    )
    parser.add_argument("--problem-type", choices=("multi_label_classification", "single_label_classification"))
    arguments = parser.parse_args()
    try:
        model = convert_checkpoint(**vars(arguments))
    except ConversionError as error:
        sys.exit(f"error: {error}")
    size = f"{type(model).__name__}, {model.num_parameters() / 1e6:.1f} M parameters"
    print(f"{arguments.output_dir}: {size}, every tensor verified by loading it again")


if __name__ == "__main__":
    main()
