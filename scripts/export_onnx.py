"""Export a saved classifier or encoder to ONNX, and compare it with torch on inputs of several batch sizes and lengths.

python scripts/export_onnx.py model_cards/sslam-tiny-esc10 sslam-tiny-esc10-onnx
python scripts/export_onnx.py sslam-base sslam-base-onnx --with-mask
"""

import argparse
import sys
from pathlib import Path

from transformers_sslam.onnx_export import ExportError, export_onnx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder with a SSLAM model and its feature extractor, or a Hub id")
    parser.add_argument("output_dir", help="a new folder, or an empty one, for model.onnx and what tells how to feed it")
    parser.add_argument("--with-mask", action="store_true", help="give the graph a second input, a mask over frames, for padded clips")
    parser.add_argument("--encoder-only", action="store_true", help="leave a classifier's head out: embeddings instead of logits")
    parser.add_argument("--opset", type=int, default=20, help="version of the ONNX operators, 18 to 23 (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        differences = export_onnx(**vars(arguments))
    except ExportError as error:
        sys.exit(f"error: {error}")
    for (batch, frames), difference in differences.items():
        print(f"{batch} x {frames:>4} frames: ONNX Runtime differs from torch by {difference:.1e} of the largest value")
    for file in sorted(Path(arguments.output_dir).iterdir()):
        print(f"{file.stat().st_size:>13,} bytes  {file}")


if __name__ == "__main__":
    main()
