"""What several test files need: where reference numbers lie, small models, seeded sounds."""

import gc
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers reads it: no test needs a network
os.environ.update(dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1,localhost"))  # a proxy knows no server of a test

import numpy as np
import pytest
import torch
from torch import nn

from transformers_sslam import SSLAMConfig, SSLAMForPreTraining


if TYPE_CHECKING:
    from transformers_sslam.audio.labels import Labels

# Nothing shows a test whether a file has reached the disk, and waiting for that is half of a short training. This fails where it would.
os.fsync = os.fstat

FIXTURES = Path(__file__).parent / "fixtures"
SHARED = Path(__file__).resolve().parents[2] / "shared"


# Files of tests that take longest, in this order, before the others: what comes last runs while other processes have nothing to do.
SLOWEST = [
    *("app_page", "fine_tuning_resume", "pretraining_loop", "data_stream", "space", "studies", "fine_tuning", "model_selection", "lora"),
    *("onnx_export", "documentation", "conversion", "weight_average", "layer_pooling", "recordings", "mteb_tasks"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))  # stable: inside a file nothing moves


def pytest_collection_finish() -> None:
    """Exempt what the test files have imported from garbage collection: each training collects, and would go through all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def shared() -> Path:
    """The folder of reference numbers and real audio that lies beside a checkout on some machines, and on others not."""
    if not (SHARED / "reference").is_dir():  # some other folder may be called so
        pytest.skip("needs ../shared (reference numbers and real audio), which is not part of the repository")
    return SHARED


@pytest.fixture
def reference(shared: Path) -> Path:
    return shared / "reference"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _nothing_compiled() -> None:
    """What other files compiled, of other sizes, counts towards the number of graphs of a function that torch allows."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def without_code_generation(monkeypatch) -> None:
    """Pre-training models are traced, but run without a C++ compiler, and fast. The options are the code generator's."""

    def compile(self, options, **rest):
        nn.Module.compile(self, backend="aot_eager", **rest)

    monkeypatch.setattr(SSLAMForPreTraining, "compile", compile)


@pytest.fixture
def without_drawing(monkeypatch) -> None:
    """Where nobody looks at the picture of a confusion matrix, any figure is enough: drawing takes longer than a short training."""
    from transformers_sslam.evaluation import per_class

    class Drawn:
        def savefig(self, file, **_):
            file.write(b"picture")

    monkeypatch.setattr(per_class, "plot_confusion_matrix", lambda matrix, classes: Drawn())


def tiny_config(**kwargs) -> SSLAMConfig:
    """Two blocks of width 32, positions for 256 frames."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "max_length": 256}
    return SSLAMConfig(**{**sizes, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_groups": 8, **kwargs})


def relative_error(actual, expected) -> float:
    """Relative L2 distance, as the tolerances of the reference numbers are given."""
    actual, expected = (torch.as_tensor(np.asarray(x), dtype=torch.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return ((actual - expected).norm() / expected.norm()).item()


def noise(seconds: float, seed: int = 0, sampling_rate: int = 16_000) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(round(seconds * sampling_rate)) * 0.1).astype(np.float32)


def named_labels(rows: Iterable[Sequence[str]], multi_label: bool, classes: Sequence[str] | None = None) -> "Labels":
    """From the names of each clip's classes; `classes`, if declared."""
    from transformers_sslam.audio.labels import Labels

    rows = [list(dict.fromkeys(row)) for row in rows]
    index = {name: i for i, name in enumerate(classes or dict.fromkeys(name for row in rows for name in row))}
    codes = np.array([index[name] for row in rows for name in row], dtype=np.int32)
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return Labels(codes, offsets, list(index), multi_label, classes is not None)


def speech_like(seconds: float, sampling_rate: int = 16_000) -> np.ndarray:
    """A gliding harmonic tone with syllables and pauses: loud and digitally silent stretches in one clip."""
    t = np.arange(round(seconds * sampling_rate)) / sampling_rate
    phase = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 0.7 * t)) / sampling_rate
    voice = sum(np.sin(k * phase) / k for k in range(1, 20))
    return (0.2 * voice * np.maximum(0, np.sin(2 * np.pi * 3 * t))).astype(np.float32)
