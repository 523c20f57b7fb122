"""Tags every recording of a folder or a list, of any length, rate and number of channels; started again, it goes on where it was.

python scripts/tag.py model=model_cards/sslam-tiny-esc10 inputs=recordings output=tags.jsonl            # one line a recording
python scripts/tag.py model=sslam-base-as2m inputs=recordings output=tags.csv hop=2 threshold=0.2       # one row a window and label
python scripts/tag.py model=sslam-base-as2m inputs='[a.wav, list.txt]' output=tags.jsonl windows=true device=cuda dtype=bfloat16
python scripts/tag.py --help

A recording's scores in .jsonl are the highest of its windows', or with pool=mean their mean. What cannot be read is written with its cause,
and tried again by the next run, as is a file that has changed: of several lines of a path the last counts, and of a .csv's rows an error
only if no others of its path follow. A recording without any label above the threshold has one row, without a label.
"""

import sys

import transformers

from transformers_sslam.errors import UserError
from transformers_sslam.evaluation.tag_files import TagSettings, tag_files
from transformers_sslam.settings import parse_settings


def main() -> None:
    transformers.logging.disable_progress_bar()
    settings = parse_settings(TagSettings, __doc__)
    try:
        summary = tag_files(settings)
    except (UserError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped: what is written stays; to go on, start again", file=sys.stderr)
        sys.exit(130)
    print(summary)


if __name__ == "__main__":
    main()
