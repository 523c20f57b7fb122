"""Push a saved model to the Hugging Face Hub: weights, configuration, feature extractor, code, card and results.

python scripts/publish.py runs/mine/model me/my-sounds --dry-run   # what would go up; touches neither the folder nor the network
python scripts/publish.py sslam-base-as2m me/sslam-base-as2m --results model_cards/sslam-base-as2m/results.json
"""

import argparse
import sys

from transformers_sslam.hub import PublishError, prepare_publication, upload


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where the model was saved; it is not changed")
    parser.add_argument("repo_id", help="owner/name on the Hub; the token is that of `hf auth login`, or HF_TOKEN")
    parser.add_argument("--results", metavar="JSON", help="description of the model to make card and results.json from")
    parser.add_argument("--dry-run", action="store_true", help="check, list and stop")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to, made if need be; main by default")
    arguments = parser.parse_args()
    try:
        with prepare_publication(arguments.folder, arguments.repo_id, arguments.results) as publication:
            for name, size in publication.files.items():
                print(f"{size:>14,} bytes  {name}")
            print(f"{sum(publication.files.values()):>14,} bytes  in all")
            if publication.left_out:
                print(f"stays here: {', '.join(publication.left_out)}")
            for note in publication.notes:
                print(f"note: {note}")
            if arguments.dry_run:
                print(f"dry run: nothing was sent to {arguments.repo_id}")
            else:
                print(f"published: {upload(publication, arguments.private, arguments.revision)}")
    except PublishError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
