"""Windows of many recordings to batches, and results back in their order.

```python
batches = prepare_batches(windows, features, batch_size=16)  # decoding and log-mels: may run in another thread or process
for span, result in compute_batches(batches, compute):  # the model
    ...
```
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from numbers import Integral
from typing import Any, NamedTuple

import torch


class Span(NamedTuple):
    """A window, in samples of its recording.

    Attributes:
        recording: what the caller knows it by, which can be compared and printed.
        start, length: where it begins, and how many samples it has, without padding.
    """

    recording: Any
    start: int
    length: int


# A window's samples, or why its recording cannot be used. `None` ends a batch, so that what came before does not wait for more.
Window = tuple[Span, torch.Tensor | ValueError]
Windows = Iterable[Window | None]


class Batch(NamedTuple):
    """A model's inputs.

    Attributes:
        spans: of each row of the inputs, with its place in the group of batches that are sorted together.
        inputs: of the model; empty without rows.
        errors: of recordings that cannot be used, with their places.
        completes_group: whether the group ends here.
    """

    spans: list[tuple[int, Span]]
    inputs: dict[str, torch.Tensor]
    errors: list[tuple[int, Span, ValueError]]
    completes_group: bool


def check_batch_size(batch_size: Any) -> None:
    """Raise a ValueError unless it is a whole number of at least 1."""
    if not isinstance(batch_size, Integral) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}, but must be a whole number of at least 1")


def prepare_batches(
    windows: Windows, features: Callable[[list[torch.Tensor]], dict[str, torch.Tensor]], batch_size: int, sorted_batches: int = 1
) -> Iterator[Batch]:
    """Batches of windows of any recordings, in their order.

    Args:
        windows: read as they are needed.
        features: makes a model's inputs of a batch's samples.
        batch_size: windows in a batch.
        sorted_batches: so many batches are collected and sorted by length, so that each is padded little.
    """
    group: list[Window] = []
    count = 0  # of those that have samples
    for window in chain(windows, (None,)):
        if window is not None:
            group.append(window)
            count += isinstance(window[1], torch.Tensor)
        if group and (window is None or count == batch_size * sorted_batches):
            yield from _prepare_group(group, features, batch_size)
            group, count = [], 0


def _prepare_group(group: list[Window], features: Callable, batch_size: int) -> Iterator[Batch]:
    errors = [(place, span, content) for place, (span, content) in enumerate(group) if isinstance(content, ValueError)]
    readable = [(place, span, content) for place, (span, content) in enumerate(group) if isinstance(content, torch.Tensor)]
    if len(readable) > batch_size:
        readable.sort(key=lambda item: len(item[2]))
    for first in range(0, max(1, len(readable)), batch_size):
        rows = readable[first : first + batch_size]
        completes = first + batch_size >= len(readable)
        inputs = features([samples for _, _, samples in rows]) if rows else {}
        yield Batch([(place, span) for place, span, _ in rows], inputs, errors if completes else [], completes)


def compute_batches(
    batches: Iterable[Batch], compute: Callable[[dict[str, torch.Tensor]], torch.Tensor]
) -> Iterator[tuple[Span, torch.Tensor | ValueError]]:
    """Each window's result, or why its recording cannot be used, in the order of the windows.

    Args:
        batches: of [`prepare_batches`].
        compute: makes results `(batch, ...)`, on the CPU, of a batch's inputs.

    Raises:
        FloatingPointError: if a result is not finite.
    """
    group: list[tuple[int, Span, torch.Tensor | ValueError]] = []
    for batch in batches:
        if batch.spans:
            results = compute(batch.inputs)
            if not results.isfinite().all():
                row = int((~results.isfinite()).flatten(1).any(1).nonzero()[0])
                span = batch.spans[row][1]
                raise FloatingPointError(
                    f"what the model gives for {span.recording}, from sample {span.start} on, is not finite: the model is damaged, or its "
                    "dtype is too narrow for it; try float32"
                )
            group += [(place, span, result) for (place, span), result in zip(batch.spans, results)]
        group += batch.errors
        if batch.completes_group:
            group.sort(key=lambda item: item[0])
            yield from ((span, result) for _, span, result in group)
            group = []
