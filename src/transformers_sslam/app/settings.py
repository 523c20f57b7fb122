"""A page to listen with, on this machine or as a Hugging Face Space: a recording's log-mel, its events, and its sound.

```bash
sslam app --model runs/detector                                     # opens http://127.0.0.1:7860
sslam app --model model_cards/sslam-small-everyday --examples recordings
sslam app --model MODEL --index embeddings.parquet                  # which sslam embed wrote: finds what sounds like a chosen span
sslam app --model MODEL --host 0.0.0.0 --max_seconds 120 --max_megabytes 20 --max_waiting 16 --open_browser false
```
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from ..errors import UserError
from ..settings import setting


EXAMPLES_RIGHTS = "The licence of the model does not cover the examples: rights to them stay with those who recorded them."


@dataclass(kw_only=True)
class LimitSettings:
    """What visitors of the page may ask for"""

    max_seconds: float = setting("length of a recording in seconds", 1800.0)
    max_megabytes: int = setting("size of a file, in megabytes", 200)
    max_waiting: int = setting("recordings that wait for their turn; more are rejected", 32)
    at_once: int = setting("recordings that are computed at the same time", 1)
    max_compute_seconds: float = setting("seconds that one recording may take", 600.0)
    live_at_once: int = setting("microphones that the live mode listens to at the same time; 0: no live mode", 1)
    keep_minutes: float = setting("minutes after which a recording is deleted that nobody looks at, although its page is open", 60.0)

    def __post_init__(self):
        for name in ("max_seconds", "max_megabytes", "max_waiting", "at_once", "max_compute_seconds", "keep_minutes"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name):g}, but must be positive")
        if self.live_at_once < 0:
            raise UserError(f"live_at_once is {self.live_at_once}, but must not be negative")


@dataclass(kw_only=True)
class AppSettings(LimitSettings):
    """Page to listen with"""

    model: str = setting("a detector or a classifier: a folder, a Hub id, or an official fine-tuned checkpoint")
    examples: str | None = setting("folder of recordings that visitors may choose, or one recording", None)
    index: str | None = setting("file that sslam embed wrote with this model, or its folder: searched for what sounds alike", None)
    host: str = setting("address to listen at; 0.0.0.0 for all networks of this machine", "127.0.0.1")
    port: int = setting("port to listen at", 7860)
    open_browser: bool = setting("open the page in a browser", True)
    window: float | None = setting("length of a window in seconds, a multiple of 0.16; null: the feature extractor's", None)
    hop: float | None = setting("seconds from one window's start to the next one's; null: half a window", None)
    live_window: float | None = setting("window of the live mode in seconds; null: 1.92, or the feature extractor's if shorter", None)
    live_hop: float | None = setting("hop of the live mode in seconds, on which its delay depends; null: 0.32", None)
    per_device_eval_batch_size: int = setting("windows in a forward pass", 16)
    device: str | None = setting("cpu, cuda, cuda:1 ...; null: an accelerator if there is one", None)
    dtype: Literal["float32", "float16", "bfloat16"] = setting("precision of the model", "float32")

    def __post_init__(self):
        super().__post_init__()
        if self.per_device_eval_batch_size < 1:
            raise UserError(f"per_device_eval_batch_size is {self.per_device_eval_batch_size}, but must be positive")
        if not 0 <= self.port <= 65_535:
            raise UserError(f"port is {self.port}, but a number from 0 to 65535 is expected")


def run(settings: AppSettings) -> None:
    """Open the page, until Ctrl-C."""
    if find_spec("gradio") is None:
        raise UserError('the page needs gradio, which is not installed: pip install "transformers-sslam[app]"')
    from .server import serve

    serve(settings)
