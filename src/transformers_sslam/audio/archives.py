"""Archives of WebDataset, read by `datasets`, with labels as text. A module of its own, since it needs `datasets` when it is imported."""

from typing import TYPE_CHECKING, Any

from datasets.packaged_modules.webdataset.webdataset import WebDataset


if TYPE_CHECKING:
    from datasets import DatasetDict, IterableDatasetDict


def _text(content: bytes) -> str:
    return content.decode().strip()


class TextWebDataset(WebDataset):
    """`datasets` reads `.cls` and the like as whole numbers: `001` and `1` would be one class, and `dog` an error."""

    DECODERS = {suffix: _text if decode is int else decode for suffix, decode in WebDataset.DECODERS.items()}


def load_webdataset(streaming: bool, **arguments: Any) -> "DatasetDict | IterableDatasetDict":
    """As `datasets.load_dataset("webdataset", ...)`, of all splits."""
    builder = TextWebDataset(**arguments)
    if streaming:
        return builder.as_streaming_dataset()
    builder.download_and_prepare()
    return builder.as_dataset()
