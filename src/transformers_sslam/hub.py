"""What a saved model needs to stand on its own: the code it runs on, and a card."""

import json
import re
import shutil
from pathlib import Path


# `AutoClass: module.Class` for each file that a saved folder may hold. `auto_map` must name every class, not only the one that was saved:
# whoever has a classifier may want its encoder.
MODEL_AUTO_MAP = {
    "AutoConfig": "configuration_sslam.SSLAMConfig",
    "AutoModel": "modeling_sslam.SSLAMModel",
    "AutoModelForAudioClassification": "modeling_sslam.SSLAMForAudioClassification",
    "AutoModelForPreTraining": "modeling_sslam_pretraining.SSLAMForPreTraining",
}
FEATURE_EXTRACTOR_AUTO_MAP = {"AutoFeatureExtractor": "feature_extraction_sslam.SSLAMFeatureExtractor"}


def add_remote_code(folder: str | Path) -> None:
    """Make a saved model load without this package, through `trust_remote_code=True`.

    Copies the inference and pre-training code next to `config.json` and names every class in the `auto_map` of `config.json` and
    `preprocessor_config.json`. Where this package is installed its own classes are used all the same.

    Args:
        folder: where `save_pretrained` of a model, and perhaps of a feature extractor, wrote to.

    Raises:
        ValueError: if the folder holds no SSLAM `config.json`.
    """
    folder = Path(folder)
    config_file, extractor_file = folder / "config.json", folder / "preprocessor_config.json"
    config = json.loads(config_file.read_text()) if config_file.is_file() else {}
    if config.get("model_type") != "sslam":
        raise ValueError(
            f"{folder} holds no config.json of a SSLAM model (model_type is {config.get('model_type')!r}): save a model there first"
        )
    _write_json(config_file, {**config, "auto_map": MODEL_AUTO_MAP})
    if extractor_file.is_file():
        _write_json(extractor_file, {**json.loads(extractor_file.read_text()), "auto_map": FEATURE_EXTRACTOR_AUTO_MAP})
    modules = {value.split(".")[0] for value in (MODEL_AUTO_MAP | FEATURE_EXTRACTOR_AUTO_MAP).values()}
    for source in sorted(_with_siblings(modules)):
        shutil.copyfile(source, folder / source.name)


def _with_siblings(modules: set[str]) -> set[Path]:
    """The files of these modules of this package and of all that they import from it by `from .x import y`."""
    found: set[Path] = set()
    while modules:
        source = Path(__file__).with_name(f"{modules.pop()}.py")
        found.add(source)
        imported = re.findall(r"^from \.(\w+) import", source.read_text(), flags=re.MULTILINE)
        modules |= {name for name in imported if source.with_name(f"{name}.py") not in found}
    return found


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


CARD = """---
library_name: transformers
pipeline_tag: {pipeline_tag}
tags:
- audio
- sslam
---

# {title}

{text}

{size}. Input: mono audio at {sampling_rate} Hz, which the feature extractor in this folder turns into log-mels of {max_length} frames
(10 ms each) by default.

```python
{usage}
```

The code that the model runs on lies beside it: where `transformers_sslam` is not installed and imported, load with
`trust_remote_code=True`.

SSLAM: Alex, Atito, Mustafa, Awais and Jackson, "SSLAM: Enhancing Self-Supervised Models with Audio Mixtures for Polyphonic Soundscapes",
ICLR 2025, [arXiv 2506.12222](https://arxiv.org/abs/2506.12222). Its encoder is EAT's: Chen et al., IJCAI 2024,
[arXiv 2401.03497](https://arxiv.org/abs/2401.03497).
"""
USAGE = {
    "audio-classification": """import transformers_sslam
from transformers import pipeline

classify = pipeline("audio-classification", model="PATH_OR_ID")
print(classify({"array": waveform, "sampling_rate": 16000}))  # a mono numpy array""",
    "feature-extraction": """import torch
import transformers_sslam
from transformers import AutoFeatureExtractor, AutoModel

extractor = AutoFeatureExtractor.from_pretrained("PATH_OR_ID")
model = AutoModel.from_pretrained("PATH_OR_ID").eval()
with torch.inference_mode():
    outputs = model(**extractor(waveform, sampling_rate=16000, return_tensors="pt"))
outputs.pooler_output  # (batch, width): the clip
model.frame_embeddings(outputs.last_hidden_state)  # (batch, time, frequency, width): each 160 ms""",
}


def write_model_card(folder: str | Path, text: str, title: str | None = None) -> None:
    """Write `README.md` beside a saved model: what `text` says of it, its size, how to use it, and whose method it is.

    Args:
        folder: holds `config.json` and `preprocessor_config.json`.
        text: Markdown: where the weights come from, what they were trained on and with what result.
        title: heading; by default the folder's class of model.
    """
    folder = Path(folder)
    config, extractor = (json.loads((folder / name).read_text()) for name in ("config.json", "preprocessor_config.json"))
    kind = config["architectures"][0]
    task = "audio-classification" if kind == "SSLAMForAudioClassification" else "feature-extraction"
    size = f"{kind}: {config['num_hidden_layers']} blocks, width {config['hidden_size']}, {config['num_attention_heads']} heads"
    if task == "audio-classification":
        size += f", {len(config.get('id2label') or 'ab')} classes"
    card = CARD.format(
        pipeline_tag=task,
        title=title or kind,
        text=text,
        size=size,
        sampling_rate=extractor["sampling_rate"],
        max_length=extractor["max_length"],
        usage=USAGE[task],
    )
    (folder / "README.md").write_text(card)
