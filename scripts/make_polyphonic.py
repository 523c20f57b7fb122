"""Make a benchmark of overlapping sounds from a labelled folder of single ones.

python scripts/make_polyphonic.py scripts/recipes/polyphonic_esc10.yaml data_dir=PATH/TO/esc10
python scripts/make_polyphonic.py data_dir=my_sounds test_share=0.3 output_dir=my_mixtures
python scripts/make_polyphonic.py --help
"""

import sys

from transformers_sslam.errors import UserError
from transformers_sslam.polyphony.benchmark import BenchmarkSettings, make_benchmark
from transformers_sslam.settings import parse_settings


def main() -> None:
    try:
        settings = parse_settings(BenchmarkSettings, __doc__)
        report = make_benchmark(settings)
    except UserError as error:
        sys.exit(f"error: {error}")
    for split, causes in report["left_out"].items():
        for cause, names in causes.items():
            print(f"left out of {split}, {cause}: {', '.join(names)}")
    clips = ", ".join(f"{count} {split}" for split, count in report["clips"].items())
    print(f"{clips} mixtures of {len(report['classes'])} classes, {report['bytes'] / 1e6:.0f} MB, in {settings.output_dir}")


if __name__ == "__main__":
    main()
