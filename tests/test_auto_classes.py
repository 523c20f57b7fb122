"""Auto classes and pipelines, with the package installed and, through the code beside a model, without it."""

import inspect
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import noise, tiny_config
from test_layer_pooling import KINDS
from test_layer_pooling import classifier as layer_pooling_classifier
from test_loading import make_former
from test_pooling import classifier as pooling_classifier
from transformers import (
    AudioClassificationPipeline,
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForAudioFrameClassification,
    pipeline,
)

from transformers_sslam import (
    SSLAMConfig,
    SSLAMFeatureExtractor,
    SSLAMForAudioClassification,
    SSLAMForAudioFrameClassification,
    SSLAMModel,
)
from transformers_sslam.publishing.hub import add_remote_code


NAMES = ["dog", "rain", "siren"]
WITHOUT_PACKAGE = """
import json, sys
sys.modules["transformers_sslam"] = None  # whoever imports it gets an ImportError
import numpy as np, torch
from transformers import (AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, pipeline)
trust, clip, results = {"trust_remote_code": True}, np.load(sys.argv[1]), []
for folder in sys.argv[2:]:
    extractor = AutoFeatureExtractor.from_pretrained(folder, **trust)
    inputs = extractor(clip, sampling_rate=16_000, padding="longest", return_tensors="pt")
    result = {"config": type(AutoConfig.from_pretrained(folder, **trust)).__name__, "extractor": type(extractor).__name__}
    with torch.inference_mode():
        encoder = AutoModel.from_pretrained(folder, **trust).eval()
        result |= {"encoder": type(encoder).__name__, "pooled": encoder(**inputs).pooler_output.tolist()}
        classifier = AutoModelForAudioClassification.from_pretrained(folder, **trust).eval()
        result |= {"model": type(classifier).__name__, "logits": classifier(**inputs).logits.tolist()}
        result["scores"] = pipeline("audio-classification", model=folder, **trust)(clip)
    results.append(result)
print("RESULT" + json.dumps(results))
"""
DETECTOR_WITHOUT_PACKAGE = """
import json, sys
sys.modules["transformers_sslam"] = None
import numpy as np, torch
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioFrameClassification
trust, clip, results = {"trust_remote_code": True}, np.load(sys.argv[1]), []
for folder in sys.argv[2:]:
    extractor = AutoFeatureExtractor.from_pretrained(folder, **trust)
    model = AutoModelForAudioFrameClassification.from_pretrained(folder, **trust).eval()
    with torch.inference_mode():
        outputs = model(**extractor(clip, sampling_rate=16_000, return_tensors="pt"))
    encoder = AutoModel.from_pretrained(folder, **trust)
    results.append({
        "model": type(model).__name__, "logits": outputs.logits.tolist(), "clip_logits": outputs.clip_logits.tolist(),
        "events": model.detect(clip, extractor),
        "same_encoder": all(torch.equal(tensor, encoder.state_dict()[name]) for name, tensor in model.sslam.state_dict().items()),
    })
print("RESULT" + json.dumps(results))
"""
SAVED_AGAIN = """
import json, sys
sys.modules["transformers_sslam"] = None
from transformers import (AutoConfig, AutoModel, AutoModelForAudioClassification, AutoModelForAudioFrameClassification,
                          AutoModelForPreTraining)
trust, again = {"trust_remote_code": True}, sys.argv[2] + "-again"
AutoModel.from_pretrained(sys.argv[2], **trust).save_pretrained(again)
kinds = (AutoConfig, AutoModel, AutoModelForAudioClassification, AutoModelForAudioFrameClassification, AutoModelForPreTraining)
print("RESULT" + json.dumps([type(kind.from_pretrained(again, **trust)).__name__ for kind in kinds]))
"""


@pytest.fixture
def classifier() -> SSLAMForAudioClassification:
    model = SSLAMForAudioClassification(tiny_config(id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)})).eval()
    torch.nn.init.normal_(model.classifier.weight)  # scores that differ visibly
    return model


@pytest.fixture
def folder(classifier, tmp_path):
    classifier.save_pretrained(tmp_path / "model")
    SSLAMFeatureExtractor(max_length=128).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_auto_classes_know_a_saved_folder(folder):
    assert type(AutoConfig.from_pretrained(folder)) is SSLAMConfig
    assert type(AutoFeatureExtractor.from_pretrained(folder)) is SSLAMFeatureExtractor
    assert type(AutoModel.from_pretrained(folder)) is SSLAMModel
    assert type(AutoModelForAudioClassification.from_pretrained(folder)) is SSLAMForAudioClassification


def test_the_encoder_of_a_classifier_is_its_own(folder, classifier):
    encoder = AutoModel.from_pretrained(folder)
    assert all(torch.equal(tensor, encoder.state_dict()[name]) for name, tensor in classifier.sslam.state_dict().items())


def test_the_pipeline_gives_softmax_scores(folder, classifier, caplog):
    caplog.set_level(logging.WARNING)
    transformers.logging.enable_propagation()
    scores = pipeline("audio-classification", model=str(folder))(noise(1.0))
    transformers.logging.disable_propagation()
    with torch.inference_mode():
        inputs = SSLAMFeatureExtractor(max_length=128)(noise(1.0), sampling_rate=16_000, return_tensors="pt")
        expected = classifier(**inputs).logits[0].softmax(-1)
    assert {score["label"]: score["score"] for score in scores} == pytest.approx(dict(zip(NAMES, expected.tolist())), rel=1e-5)
    assert "not supported" not in caplog.text  # the pipeline knows the class


def test_the_pipeline_gives_sigmoid_scores_for_tags_that_overlap(folder, classifier):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"problem_type": "multi_label_classification"}))
    # Older releases of Transformers take softmax unless they are told otherwise; newer ones read `problem_type`.
    default = inspect.signature(AudioClassificationPipeline.postprocess).parameters["function_to_apply"].default
    told = {} if default is None else {"function_to_apply": "sigmoid"}
    scores = pipeline("audio-classification", model=str(folder))(noise(1.0), **told)
    with torch.inference_mode():
        inputs = SSLAMFeatureExtractor(max_length=128)(noise(1.0), sampling_rate=16_000, return_tensors="pt")
        expected = classifier(**inputs).logits[0].sigmoid()
    assert {score["label"]: score["score"] for score in scores} == pytest.approx(dict(zip(NAMES, expected.tolist())), rel=1e-5)


def test_the_pipeline_resamples_and_takes_batches(folder):
    pytest.importorskip("torchaudio")
    classify = pipeline("audio-classification", model=str(folder))
    clips = [{"array": noise(1.0, sampling_rate=44_100), "sampling_rate": 44_100}, noise(0.5)]
    assert [len(scores) for scores in classify(clips, batch_size=2, top_k=1)] == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_pipeline_runs_in_half_precision(folder, dtype):
    whole = pipeline("audio-classification", model=str(folder))(noise(1.0))
    half = pipeline("audio-classification", model=str(folder), dtype=dtype)(noise(1.0))
    scores = {score["label"]: score["score"] for score in whole}
    assert {score["label"]: score["score"] for score in half} == pytest.approx(scores, abs=0.02)


def run_without_package(tmp_path, *folders: Path, program: str = WITHOUT_PACKAGE) -> list[dict]:
    np.save(tmp_path / "clip.npy", noise(1.0))
    script = tmp_path / "without_package.py"
    script.write_text(program)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, script, tmp_path / "clip.npy", *folders]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.partition("RESULT")[2])


def test_a_classifier_loads_where_the_package_is_not_installed(folder, classifier, tmp_path):
    """However it pools tokens and blocks: all in one process, whose imports take longest."""
    former = shutil.copytree(folder, tmp_path / "former")
    make_former(former)  # a patch projection saved as a convolution
    others = [pooling_classifier(pooling) for pooling in ("mean_and_std", "mean_and_max_by_frequency")]
    others += [layer_pooling_classifier(kind) for kind in KINDS]
    folders = [folder, former, *(tmp_path / str(i) for i in range(len(others)))]
    for model, path in zip(others, folders[2:]):
        model.save_pretrained(path)
        SSLAMFeatureExtractor(max_length=128).save_pretrained(path)
    for path in folders:
        add_remote_code(path)
    inputs = SSLAMFeatureExtractor()(noise(1.0), sampling_rate=16_000, padding="longest", return_tensors="pt")
    for model, result in zip([classifier, classifier, *others], run_without_package(tmp_path, *folders), strict=True):
        assert [result[name] for name in ("config", "extractor", "encoder", "model")] == [
            "SSLAMConfig",
            "SSLAMFeatureExtractor",
            "SSLAMModel",
            "SSLAMForAudioClassification",
        ]
        tolerance = 1e-6 if model is classifier else 1e-5  # large weights
        with torch.inference_mode():
            torch.testing.assert_close(torch.tensor(result["logits"]), model(**inputs).logits, atol=tolerance, rtol=tolerance)
        assert {score["label"] for score in result["scores"]} == set(NAMES)


@pytest.fixture
def detector() -> SSLAMForAudioFrameClassification:
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    model = SSLAMForAudioFrameClassification(tiny_config(**names, steps_per_second=25, frame_pooling="attention")).eval()
    for layer in (model.frame_classifier, model.time_attention, model.frequency_attention):
        torch.nn.init.normal_(layer.weight)
    return model


@pytest.fixture
def detector_folder(detector, tmp_path):
    detector.save_pretrained(tmp_path / "detector")
    SSLAMFeatureExtractor(max_length=128).save_pretrained(tmp_path / "detector")
    return tmp_path / "detector"


def test_auto_classes_know_a_detector(detector_folder, detector):
    loaded = AutoModelForAudioFrameClassification.from_pretrained(detector_folder)
    assert type(loaded) is SSLAMForAudioFrameClassification
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in detector.state_dict().items())
    assert type(AutoModel.from_pretrained(detector_folder)) is SSLAMModel


def test_a_detector_finds_events_where_the_package_is_not_installed(detector_folder, detector, tmp_path):
    add_remote_code(detector_folder)
    extractor = SSLAMFeatureExtractor(max_length=128)
    with torch.inference_mode():
        outputs = detector(**extractor(noise(1.0), sampling_rate=16_000, return_tensors="pt"))
    (result,) = run_without_package(tmp_path, detector_folder, program=DETECTOR_WITHOUT_PACKAGE)
    assert (result["model"], result["same_encoder"]) == ("SSLAMForAudioFrameClassification", True)
    torch.testing.assert_close(torch.tensor(result["logits"]), outputs.logits, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(torch.tensor(result["clip_logits"]), outputs.clip_logits, atol=1e-6, rtol=1e-6)
    events = detector.detect(noise(1.0), extractor)
    assert events
    assert [event[:3] for event in result["events"]] == [list(event[:3]) for event in events]
    assert [event[3] for event in result["events"]] == pytest.approx([event.score for event in events], abs=1e-6)


def test_a_model_saved_again_without_the_package_has_the_code_of_every_class(folder, tmp_path):
    """Transformers saves the files that a class imports, and the names of all classes."""
    add_remote_code(folder)
    expected = [*("SSLAMConfig", "SSLAMModel", "SSLAMForAudioClassification", "SSLAMForAudioFrameClassification", "SSLAMForPreTraining")]
    assert run_without_package(tmp_path, folder, program=SAVED_AGAIN) == expected
    code = {path.name for path in folder.glob("*.py")}
    assert {path.name for path in (tmp_path / "model-again").glob("*.py")} == code


def test_code_beside_a_model_does_not_displace_the_package(folder):
    add_remote_code(folder)
    assert type(AutoModel.from_pretrained(folder)) is SSLAMModel
    assert type(AutoFeatureExtractor.from_pretrained(folder)) is SSLAMFeatureExtractor


def test_what_is_saved_again_does_not_claim_code_that_is_not_there(folder, tmp_path):
    add_remote_code(folder)
    SSLAMForAudioClassification.from_pretrained(folder).save_pretrained(tmp_path / "again")
    AutoFeatureExtractor.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for name in ("config.json", "preprocessor_config.json"):
        assert "auto_map" not in json.loads((tmp_path / "again" / name).read_text())


def test_code_is_not_put_beside_what_is_no_model(tmp_path):
    with pytest.raises(ValueError, match="holds no config.json"):
        add_remote_code(tmp_path)
