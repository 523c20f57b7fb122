"""Names in messages: which valid ones are meant by one that is not, and the first ones of many."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any


# What other programs call it: names that are not similar enough to be found by spelling.
OTHER_NAMES = {
    "batch_size": ("per_device_train_batch_size", "per_device_eval_batch_size"),
    "epochs": ("num_train_epochs", "max_steps"),
    "max_epochs": ("num_train_epochs", "max_steps"),
    "num_train_epochs": ("max_steps",),
    "lr": ("learning_rate",),
    "min_lr": ("lr_scheduler_kwargs.min_lr",),
    "steps": ("max_steps",),
    "num_workers": ("dataloader_num_workers",),
    "workers": ("dataloader_num_workers",),
    "precision": ("bf16", "dtype"),
    "mixed_precision": ("bf16", "fp16"),
    "no_cuda": ("use_cpu", "device"),
    "cpu": ("use_cpu", "device"),
    "evaluation_strategy": ("eval_strategy",),
    "model_name_or_path": ("model",),
    "pretrained": ("model",),
    "init_from": ("model",),
    "checkpoint": ("model",),
    "ckpt_path": ("resume_from_checkpoint", "model"),
    "resume": ("resume_from_checkpoint",),
    "dataset_name": ("data_dir",),
    "dataset": ("data_dir",),
    "train_file": ("data_dir",),
    "input": ("inputs", "data_dir"),
    "out": ("output_dir", "output"),
    "out_dir": ("output_dir",),
    "logger": ("report_to",),
    "log_every_n_steps": ("logging_steps",),
    "compile": ("torch_compile",),
    "gradient_clip_val": ("max_grad_norm",),
    "accumulate_grad_batches": ("gradient_accumulation_steps",),
    "val_check_interval": ("eval_steps",),
    "num_labels": ("label_column",),
}


def listed(names: Iterable[Any], most: int = 5) -> str:
    """The first names, and how many more there are."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def similar(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The known names of the most similar spelling, the nearest first."""
    return get_close_matches(name, list(known), n=most, cutoff=0.6)


def did_you_mean(names: Sequence[str]) -> str:
    """A question that ends in a space; nothing of no names."""
    return f"did you mean {' or '.join(names)}? " if names else ""


def closest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Which of the `known` settings may be meant, or all of them, or where they are listed."""
    known = [other for other in known if other not in ("help", "config", "print_config")]
    alike = [other for other in OTHER_NAMES.get(name, ()) if other in known or other.partition(".")[0] in known]
    alike += [other for other in similar(name, known) if other not in alike]
    alike += [other for other in known if other.rsplit(".", 1)[-1] == name and other not in alike]
    if alike:
        return did_you_mean([prefix + other for other in alike[:3]]).strip()
    return f"there are {', '.join(sorted(known))}" if len(known) <= 40 else "--help lists all"
