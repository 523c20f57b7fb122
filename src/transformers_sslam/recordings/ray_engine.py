"""The same windows and batches as stages of a Ray Data pipeline: decoding and log-mels in tasks on CPUs, the model in actors.

Ray repeats a task or an actor's batch whose worker is lost. Results come in the order of the recordings, so that they are written by the
process that asked for them exactly as its own would be. Recordings and the model must lie where every machine of the cluster reads them.
"""

import pickle
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import torch

from ..batching_sslam import Batch, compute_batches, prepare_batches
from ..errors import UserError
from ..evaluation.loading import load_model
from ..tasks_sslam import Task
from .inputs import Recording, read_windows
from .processing import RecordingsSettings, Result


def compute_with_ray(settings: RecordingsSettings, task: Task, portions: list[list[Recording]]) -> Iterator[Result]:
    """The results of all windows, see [`compute_here`].

    Raises:
        UserError: if Ray is not installed, or a worker cannot load the model.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError('engine is ray, which is not installed: pip install "transformers-sslam[ray]"') from error
    if not portions:
        return
    ray.init(ignore_reinit_error=True, log_to_driver=False)  # a cluster that the environment names, or this machine
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    on_gpu = torch.device(settings.device).type != "cpu" if settings.device else ray.cluster_resources().get("GPU", 0) > 0
    model: Any = _Compute
    rows = (
        ray.data.from_items([{"portion": pickle.dumps(portion)} for portion in portions], override_num_blocks=len(portions))
        .flat_map(_Prepare(task, settings.per_device_eval_batch_size))
        .map(
            model,
            fn_constructor_args=(settings, task, "cuda" if on_gpu else "cpu"),
            # Actors that hold the CPUs would leave none for decoding; and stages of unequal demands stay apart.
            num_cpus=0,
            num_gpus=1 if on_gpu else 0,
            compute=ray.data.ActorPoolStrategy(size=settings.ray_workers),
        )
        .iter_rows()
    )
    yield from compute_batches((pickle.loads(row["batch"]) for row in rows), itemgetter("results"))


class _Prepare:
    """Batches of a portion's windows."""

    def __init__(self, task: Task, batch_size: int):
        self.task, self.batch_size = task, batch_size

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        windows = read_windows(self.task, [pickle.loads(row["portion"])])
        for batch in prepare_batches(windows, self.task.features, self.batch_size, self.task.sorted_batches):
            yield {"batch": pickle.dumps(batch)}


class _Compute:
    """A batch with results in place of the inputs, by an actor that has loaded the model."""

    def __init__(self, settings: RecordingsSettings, task: Task, device: str):
        model: Any = load_model(settings.model_class, settings.model, settings.dtype, device)[0]
        self.task, self.model = task, model

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        batch: Batch = pickle.loads(row["batch"])
        results = {}
        if batch.spans:
            inputs = {name: tensor.to(self.model.device) for name, tensor in batch.inputs.items()}
            results["results"] = self.task.compute(self.model, inputs)
        return {"batch": pickle.dumps(batch._replace(inputs=results))}
