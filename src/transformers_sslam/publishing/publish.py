"""The command `sslam publish`: a model, or a Space that runs it, to the Hugging Face Hub or to a folder.

```bash
sslam publish --model runs/mine --repo_id me/my-sounds --dry_run
sslam publish --model runs/mine --space --output_dir my-page --examples recordings
sslam publish --model runs/mine --space --repo_id me/my-page
```
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..files import check_free, write_folder_atomically
from ..settings import setting
from .hub import Publication, check_repo_id, prepare_publication, upload
from .space import PACKAGE, build_space


@dataclass(kw_only=True)
class SpaceSettings:
    """Space: a page that runs the model"""

    space: bool = setting("make a Space, a page to listen with, which holds the model; --repo_id is then the Space's", False)
    output_dir: str | None = setting("folder to write the Space to, new or empty; with repo_id it is also sent", None)
    examples: str | None = setting("recording, or folder of recordings, that visitors of the Space may choose; they are published", None)

    def __post_init__(self):
        if not self.space and (name := next((name for name in ("output_dir", "examples") if getattr(self, name) is not None), None)):
            raise UserError(f"{name} is {getattr(self, name)!r}, but only a Space has it: add --space, or leave it out")


@dataclass(kw_only=True)
class PublicationSettings(SpaceSettings):
    """Publication"""

    model: str = setting("folder where the model was saved; it is not changed. Of a Space also a Hub id, or an official checkpoint")
    repo_id: str | None = setting("owner/name on the Hub; the token is that of `hf auth login`, or HF_TOKEN", None)
    results: str | None = setting("JSON file that describes the model, for its card and results.json; by default the folder's own", None)
    dry_run: bool = setting("check, list and stop", False)
    private: bool = setting("make a new repository private", False)
    revision: str | None = setting("branch to push to, created if need be; by default main", None)

    def __post_init__(self):
        super().__post_init__()
        if self.repo_id is None and self.output_dir is None:
            alternative = ", or --output_dir FOLDER for a Space that stays here" if self.space else ""
            raise UserError(f"repo_id is required: write --repo_id OWNER/NAME{alternative}")
        if self.repo_id is None and (self.private or self.revision is not None):
            raise UserError("private or revision is set, but nothing is sent: add --repo_id OWNER/NAME")


def run(settings: PublicationSettings) -> None:
    """List the files, and publish them unless `dry_run` is set."""
    if settings.space:
        _publish_space(settings)
        return
    with prepare_publication(settings.model, str(settings.repo_id), settings.results) as publication:
        _publish(publication, settings)


def _publish_space(settings: PublicationSettings) -> None:
    if settings.repo_id is not None:
        check_repo_id(settings.repo_id)
    place = None if settings.output_dir is None else check_free(settings.output_dir)
    if settings.dry_run:
        place = None
    with tempfile.TemporaryDirectory(prefix="space-") if place is None else write_folder_atomically(place) as folder:
        space = build_space(Path(folder), settings.model, settings.repo_id, settings.examples, settings.results)
        _publish(space, settings)
    if place is not None:
        print(f"written: {settings.output_dir}; `python app.py` there starts the page")


def _publish(publication: Publication, settings: PublicationSettings) -> None:
    code = {name: size for name, size in publication.files.items() if name.startswith(f"{PACKAGE.name}/")}
    for name, size in publication.files.items():
        if name not in code:
            print(f"{size:>14,} bytes  {name}")
    if code:
        print(f"{sum(code.values()):>14,} bytes  {PACKAGE.name}/, {len(code)} files")
    print(f"{sum(publication.files.values()):>14,} bytes  in all")
    if publication.left_out:
        print(f"stays here: {', '.join(publication.left_out)}")
    for note in publication.notes:
        print(f"note: {note}")
    if settings.dry_run:
        print(f"dry run: nothing was sent to {settings.repo_id}" if settings.repo_id else "dry run: nothing was written")
    elif settings.repo_id:
        print(f"published: {upload(publication, settings.private, settings.revision)}")
