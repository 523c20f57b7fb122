"""Transformers' own tests of models, configurations, feature extractors and pipelines, run on this package's classes.

They come from the source distribution of the Transformers release that is installed, which pip downloads into build/ (`make conformance`
runs this; plain pytest does not collect it).
"""

import importlib
import inspect
import json
import os
import subprocess
import sys
import tarfile
import unittest
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.utils import import_utils

import transformers_sslam
from transformers_sslam import (
    SSLAMConfig,
    SSLAMFeatureExtractor,
    SSLAMForAudioClassification,
    SSLAMForAudioFrameClassification,
    SSLAMModel,
)


BUILD = Path(__file__).parents[2] / "build"
FRAMES, MEL_BINS = 64, 128
SMALL = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37, "max_length": FRAMES},
    **{"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
}
# Of a module that the source distribution lacks.
CONFIG_COMMON_KWARGS = {
    **{"return_dict": False, "output_hidden_states": True, "output_attentions": True, "dtype": "float16"},
    **{"chunk_size_feed_forward": 5, "architectures": ["BertModel"], "problem_type": "regression", "is_encoder_decoder": True},
    **{"id2label": {0: "label"}, "label2id": {"label": 0}},
}


class StandIns(Loader, MetaPathFinder):
    """In place of modules that the tests import but the source distribution lacks, modules that have every class, empty."""

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.startswith("transformers_tests.") else None

    def exec_module(self, module):
        module.config_common_kwargs = CONFIG_COMMON_KWARGS
        module.__getattr__ = lambda name: type(name, (), {})


def transformers_tests() -> Path:
    """The folder of tests of the installed release."""
    name = f"transformers-{transformers.__version__}"
    if not (BUILD / name / "tests").is_dir():
        download = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--no-build-isolation",
            "--dest",
            str(BUILD),
        ]
        subprocess.run([*download, name.replace("-", "==")], check=True)
        with tarfile.open(BUILD / f"{name}.tar.gz") as archive:
            archive.extractall(BUILD, filter="data")
    return BUILD / name / "tests"


def save_small_models(folder: Path) -> None:
    """In place of the models on the Hub that the tests of pipelines load."""
    home = folder / SSLAMConfig.model_type / SSLAMForAudioClassification.__name__
    SSLAMForAudioClassification(SSLAMConfig(**SMALL)).save_pretrained(home)
    SSLAMFeatureExtractor(max_length=FRAMES).save_pretrained(home)
    (folder / "reports").mkdir(exist_ok=True)
    processors = {"tokenizer_classes": [], "processor_classes": [SSLAMFeatureExtractor.__name__]}
    (folder / "reports" / "tiny_model_summary.json").write_text(json.dumps({SSLAMForAudioClassification.__name__: processors}))


def import_tests(name: str) -> ModuleType:
    return importlib.import_module(f"transformers_tests.test_{name}")


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(BUILD / "conformance")  # read when the tests are imported
save_small_models(BUILD / "conformance")
# The tests would import a second Transformers, from the source distribution.
transformers.utils.direct_transformers_import = import_utils.direct_transformers_import = lambda *_: transformers
# A package of another name than this repository's tests.
package = sys.modules["transformers_tests"] = ModuleType("transformers_tests")
package.__path__ = [str(transformers_tests())]
sys.meta_path.append(StandIns())
pipelines, configurations, models = (import_tests(name) for name in ("pipeline_mixin", "configuration_common", "modeling_common"))
feature_extractors = import_tests("sequence_feature_extraction_common")
pipelines.transformers_module = transformers_sslam  # where the tests look for the feature extractor
# The mixins look classes up by name, in tables that `AutoModel.register` does not fill.
modeling_auto.MODEL_MAPPING_NAMES[SSLAMConfig.model_type] = SSLAMModel.__name__
modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES[SSLAMConfig.model_type] = SSLAMForAudioClassification.__name__
modeling_auto.MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING_NAMES[SSLAMConfig.model_type] = SSLAMForAudioFrameClassification.__name__


class ModelTester:
    """What the mixins ask about a model."""

    batch_size, is_training, num_labels = 3, True, 2
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    seq_length = 1 + FRAMES // 16 * MEL_BINS // 16

    def get_config(self) -> SSLAMConfig:
        return SSLAMConfig(**SMALL)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"input_values": models.floats_tensor([self.batch_size, FRAMES, MEL_BINS])}

    def prepare_config_and_inputs(self):
        config, inputs = self.prepare_config_and_inputs_for_common()
        return config, inputs["input_values"], models.ids_tensor([self.batch_size], self.num_labels)


class ModelTest(models.ModelTesterMixin, pipelines.PipelineTesterMixin, unittest.TestCase):
    all_model_classes = (SSLAMModel, SSLAMForAudioClassification, SSLAMForAudioFrameClassification)
    pipeline_model_mapping = {"audio-classification": SSLAMForAudioClassification}
    test_resize_embeddings = False  # the input is not made of tokens
    test_can_init_all_missing_weights_before_2023 = True  # otherwise only with a copyright line of 2023 or later

    def setUp(self):
        self.model_tester = ModelTester()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """The mixin has no labels for time steps. They are always the same, as it compares losses."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is SSLAMForAudioFrameClassification:
            tester = self.model_tester
            inputs["labels"] = torch.full((tester.batch_size, FRAMES // 16, tester.num_labels), 0.25)
            inputs["clip_labels"] = torch.full((tester.batch_size, tester.num_labels), 0.75)
        return inputs

    def test_model_get_set_embeddings(self):
        """As the library's AST tests have it: the input embedding is not an nn.Embedding, and there is no output embedding."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            assert isinstance(model.get_input_embeddings(), torch.nn.Module)
            assert model.get_output_embeddings() is None

    def test_forward_signature(self):
        for model_class in self.all_model_classes:
            assert list(inspect.signature(model_class.forward).parameters)[1] == "input_values"


class ConfigTest(unittest.TestCase):
    def test_config(self):
        configurations.ConfigTester(
            self, config_class=SSLAMConfig, has_text_modality=False, hidden_size=32, num_attention_heads=4
        ).run_common_tests()


class FeatureExtractionTester:
    """What the mixin asks about a feature extractor: clips whose lengths grow by `seq_length_diff` samples."""

    batch_size, min_seq_length, max_seq_length, feature_size, padding_value = 7, 400, 2000, 1, 0.0
    seq_length_diff = (max_seq_length - min_seq_length) // (batch_size - 1)

    def prepare_feat_extract_dict(self):
        return {"feature_size": 1, "padding_value": 0.0, "sampling_rate": 16_000, "return_attention_mask": True, "do_normalize": True}

    def prepare_inputs_for_common(self, equal_length=False, numpify=False):
        grow = range(self.min_seq_length, self.max_seq_length, self.seq_length_diff)
        generator = np.random.default_rng(0)
        waveforms = [generator.random(length) for length in ([self.max_seq_length] * self.batch_size if equal_length else grow)]
        return waveforms if numpify else [waveform.tolist() for waveform in waveforms]


class FeatureExtractionTest(feature_extractors.SequenceFeatureExtractionTestMixin, unittest.TestCase):
    feature_extraction_class = SSLAMFeatureExtractor

    def setUp(self):
        self.feat_extract_tester = FeatureExtractionTester()


class AudioClassificationPipelineTests:
    """What the tests of pipelines ask for."""

    __test__ = False

    def get_test_pipeline(self, model, tokenizer=None, feature_extractor=None, dtype="float32", **_):
        pipeline = transformers.AudioClassificationPipeline(model=model, feature_extractor=feature_extractor, dtype=dtype)
        return pipeline, [np.zeros(14_000, dtype=np.float32), np.random.default_rng(0).normal(size=34_000)]

    def run_pipeline_test(self, pipeline, examples):
        labels = set(pipeline.model.config.id2label.values())
        for example in examples:
            for options, count in (({}, len(labels)), ({"top_k": 1}, 1)):
                scores = pipeline(example, **options)
                assert len(scores) == count
                assert all(type(score["score"]) is float and score["label"] in labels for score in scores)


test = pipelines.pipeline_test_mapping["audio-classification"]
tests_are_named = isinstance(test["test"], str)  # in older releases of Transformers they are classes
test["test"] = f"{__name__}.{AudioClassificationPipelineTests.__name__}" if tests_are_named else AudioClassificationPipelineTests
