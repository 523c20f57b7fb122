"""LoRA: low-rank adapters beside the frozen weights of a pre-trained encoder (arXiv 2106.09685), from PEFT.

Checkpoints hold adapters and head alone. At the end the adapters are merged into the weights, so that the model is an ordinary one.
"""

import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..pooling_sslam import SSLAMLayerPooling
from ..settings import setting


ADAPTER = "adapter"  # a folder in output_dir
ADAPTER_FILES = (f"{ADAPTER}/adapter_config.json", f"{ADAPTER}/adapter_model.safetensors")


@dataclass(kw_only=True)
class LoraSettings:
    """LoRA

    Names are those of `peft.LoraConfig`. The head, without its norm, is trained as it is, and is part of the adapter that is saved.

    Raises:
        UserError: if a value is out of range.
    """

    r: int = setting("rank of the adapters, which are trained in place of the encoder's own weights; 0: no adapters", 0)
    lora_alpha: int = setting("scale of the adapters, times r: their output is multiplied by lora_alpha / r", 16)
    lora_dropout: float = setting("dropout on the input of the adapters", 0.1)
    target_modules: list[str] = setting("linear layers of each block that get adapters", ["q_proj", "v_proj"])
    learning_rate: float | None = setting("peak learning rate of the adapters; null: learning_rate, as for the head", None)
    merge: bool = setting("true: save the model with its adapters merged, and the adapter beside it; false: the adapter alone", True)

    def __post_init__(self):
        if self.r < 0:
            raise UserError(f"lora.r is {self.r}, but must be positive, or 0 for no adapters")
        if self.lora_alpha <= 0:
            raise UserError(f"lora.lora_alpha is {self.lora_alpha}, but must be positive")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora.lora_dropout is {self.lora_dropout:g}, but a fraction in [0, 1) is expected")
        if not self.target_modules:
            raise UserError("lora.target_modules is empty, but adapters need at least one layer: name it, or leave lora out")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise UserError(f"lora.learning_rate is {self.learning_rate:g}, but must be positive")


def check_peft() -> None:
    """`UserError` if PEFT is not installed."""
    if find_spec("peft") is None:
        raise UserError("lora.r is set, but peft is not installed, which LoRA needs: pip install 'transformers-sslam[lora]'")


def add_adapters(model: PreTrainedModel, settings: LoraSettings, checkpoint: str) -> Any:
    """The model with an adapter beside each target layer, in which adapters and the head's linear layers are trained: a `peft.PeftModel`.

    Args:
        model: a classifier or an event detector.
        settings: of the adapters.
        checkpoint: what the adapter's configuration names as the model that it belongs to.

    Raises:
        UserError: if a target is not a linear layer of the encoder's blocks.
    """
    from peft import LoraConfig, get_peft_model

    encoder = model.base_model_prefix
    layers = getattr(model, encoder).layers
    linear = {name.rpartition(".")[2] for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    if unknown := [name for name in settings.target_modules if name not in linear]:
        raise UserError(f"lora.target_modules has {unknown[0]!r}, but the linear layers of a block are {', '.join(sorted(linear))}")
    # Not the head's norm: the linear layers behind it absorb its scale and shift, and PEFT, which compares ends of names, would take the
    # norm of the embeddings for it.
    head = [name for name, module in model.named_children() if isinstance(module, nn.Linear | SSLAMLayerPooling)]
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules,
        modules_to_save=head,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)  # PEFT asks for it
        adapted = get_peft_model(model, config)
    config.base_model_name_or_path = checkpoint
    return adapted


def merge_adapters(model: Any, folder: Path | None) -> PreTrainedModel:
    """The ordinary model that equals one with adapters. Adapters and head are saved to `folder` first, unless it is `None`."""
    if folder is not None:
        model.save_pretrained(folder)
        (folder / "README.md").unlink()  # a card without content
    return model.merge_and_unload(safe_merge=True)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Number of parameters that are trained, and that the saved model will have."""
    own = [p.numel() for name, p in model.named_parameters() if ".lora_" not in name and ".original_module." not in name]
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(own)
