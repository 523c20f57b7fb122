"""The configuration's presets and what it refuses."""

import json
import math

import pytest
import torch
from conftest import tiny_config
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from transformers_sslam import SSLAMConfig, SSLAMForAudioClassification, SSLAMModel
from transformers_sslam.configuration_sslam import LARGEST_SIZES


@pytest.mark.parametrize(("preset", "layers", "width", "heads", "millions"), [("base", 12, 768, 12, 85.2), ("large", 24, 1024, 16, 302.6)])
def test_presets_are_the_published_sizes(preset, layers, width, heads, millions):
    config = getattr(SSLAMConfig, preset)(drop_path_rate=0.1)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (layers, width, heads)
    assert config.drop_path_rate == 0.1
    assert config.max_length // config.patch_size == 768
    with torch.device("meta"):
        assert SSLAMModel(config).num_parameters() / 1e6 == pytest.approx(millions, abs=0.1)


def test_save_and_load(tmp_path):
    config = tiny_config(classifier_pooling="mean", id2label={0: "a", 1: "b", 2: "c"}, drop_path_rate=0.25)
    config.save_pretrained(tmp_path)
    loaded = SSLAMConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.num_labels == 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"hidden_size": 30}, "hidden_size is 30 and num_attention_heads is 4"),
        ({"hidden_size": 30, "num_attention_heads": 5}, "hidden_size is 30.*multiple of 4"),
        ({"num_mel_bins": 100}, "num_mel_bins is 100 and patch_size is 16"),
        ({"max_length": 1000}, "max_length is 1000 and patch_size is 16"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
        ({"hidden_dropout_prob": -0.1}, "hidden_dropout_prob is -0.1"),
        ({"hidden_act": "foo"}, "hidden_act is 'foo'"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps is 0"),
        ({"initializer_range": -1.0}, "initializer_range is -1.0"),
        ({"patch_embedding_gain": math.inf}, "patch_embedding_gain is inf"),
        ({"padding_value": math.nan}, "padding_value is nan"),
        ({"decoder_kernel_size": 2}, "decoder_kernel_size is 2"),
        ({"decoder_hidden_size": 36}, "decoder_hidden_size is 36 and decoder_num_groups is 8"),
        ({"problem_type": "multilabel"}, "problem_type is 'multilabel', but must be one of None, regression, single_label_classification"),
        ({"id2label": ["dog", "rain"]}, r"id2label is \['dog', 'rain'\], but the name of each number is expected"),
        ({"event_detection": {"thr": 1}}, "config.event_detection cannot have 'thr'"),
        ({"event_detection": {"threshold": 2}}, r"threshold is 2 for 'LABEL_0', but a number in \[0, 1\] is expected"),
        ({"event_detection": {"median_filter": {"dog": -1}}}, "median_filter is -1 for 'dog', but a number of seconds from 0"),
    ],
)
def test_contradictions_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**kwargs)


def test_whole_numbers_are_numbers():
    """As JSON and YAML may have them."""
    assert SSLAMConfig(initializer_range=0, layer_norm_eps=1).layer_norm_eps == 1
    with pytest.raises(ValueError, match="mask_ratio is 1, but must lie between 0 and 1"):
        SSLAMConfig(mask_ratio=1)


@pytest.mark.parametrize("kwargs", [{"hidden_size": "768"}, {"classifier_pooling": "max"}])
def test_wrong_types_are_refused(kwargs):
    with pytest.raises(StrictDataclassError, match=next(iter(kwargs))):
        SSLAMConfig(**kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        *({name: size} for name in LARGEST_SIZES for size in (10**7 + 48, -16, 0, 1e6, math.nan, True, "16", None)),
        *(
            {name: math.nan}
            for name in ("mask_ratio", "ema_decay", "layer_norm_eps", "drop_path_rate", "padding_value", "mask_ratio_adjust")
        ),
        *({name: True} for name in ("initializer_range", "mask_ratio", "global_loss_weight")),
    ],
    ids=str,
)
def test_sizes_that_no_model_has_are_refused_at_once(tmp_path, kwargs):
    """Before a table of that size is made."""
    with pytest.raises((ValueError, StrictDataclassError), match=next(iter(kwargs))):
        SSLAMConfig(**kwargs)
    SSLAMConfig().save_pretrained(tmp_path)
    with pytest.raises((ValueError, StrictDataclassError), match=next(iter(kwargs))):
        SSLAMConfig.from_pretrained(tmp_path, **kwargs)


@pytest.mark.parametrize("names", [{"a": 0, "b": 1}, {"b": 1, "a": 0}, {"x": 2, "a": 0, "b": 1}], ids=str)
@pytest.mark.parametrize("counted", [True, False])
def test_names_of_classes_may_be_given_as_label2id_alone(tmp_path, names, counted):
    given = {"label2id": names} | ({"num_labels": len(names)} if counted else {})
    SSLAMConfig(id2label={0: "old", 1: "older"}, label2id={"old": 0, "older": 1}).save_pretrained(tmp_path / "two")
    SSLAMConfig().save_pretrained(tmp_path / "none")
    configs = [SSLAMConfig(**given), AutoConfig.for_model("sslam", **given)]
    configs += [kind.from_pretrained(tmp_path / folder, **given) for kind in (SSLAMConfig, AutoConfig) for folder in ("two", "none")]
    configs[0].save_pretrained(tmp_path / "again")
    for config in (*configs, SSLAMConfig.from_pretrained(tmp_path / "again")):
        assert config.label2id == names
        assert config.id2label == {i: name for name, i in names.items()}
        assert config.num_labels == len(names)
    SSLAMModel(tiny_config()).save_pretrained(tmp_path / "encoder")
    model = SSLAMForAudioClassification.from_pretrained(tmp_path / "encoder", **given)
    assert model.config.id2label == {i: name for name, i in names.items()}
    assert model.classifier.out_features == len(names)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_labels": 3, "label2id": {"a": 0, "b": 1}}, "each class from 0 on needs one name"),
        ({"label2id": {"a": 0, "b": 0}}, "each class from 0 on needs one name"),
        ({"label2id": {"a": 1}}, "each class from 0 on needs one name"),
        ({"label2id": ["a"]}, r"label2id is \['a'\] .* each class from 0 on needs one name"),
        ({"label2id": {"a": "dog"}}, "each class from 0 on needs one name"),
        ({"num_labels": 3, "id2label": {0: "a", 1: "b"}}, "num_labels is 3, but id2label has 2 names: leave num_labels out"),
        ({"id2label": {0.5: "a"}}, "id2label has the keys 0.5, but the classes' numbers are expected, 0 to 0"),
        ({"id2label": {"dog": 0}}, "id2label has the keys 'dog'"),
        *(({"num_labels": number}, f"num_labels is {number!r}, but a whole number of at least 1") for number in (0, -1, "3", True, 1.0)),
    ],
    ids=str,
)
def test_names_that_do_not_fit_the_classes_are_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        SSLAMConfig(**given)
    SSLAMConfig(id2label={0: "old", 1: "older"}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        SSLAMConfig.from_pretrained(tmp_path, **given)


def test_a_classifier_has_classes():
    with pytest.raises(ValueError, match="num_labels is 0"):
        SSLAMForAudioClassification(tiny_config(id2label={}))


@pytest.mark.parametrize("text", [False, True], ids=["numbers", "text"])
@pytest.mark.parametrize("former", [None, {0: "old", 1: "older"}], ids=str)
def test_a_checkpoint_takes_other_classes_as_in_the_guides_of_transformers(tmp_path, former, text):
    SSLAMForAudioClassification(tiny_config(id2label=former)).save_pretrained(tmp_path)
    names = {str(i) if text else i: name for i, name in enumerate("abc")}
    given = {"num_labels": 3, "id2label": names, "label2id": {name: i for i, name in names.items()}}
    config = SSLAMForAudioClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **given).config
    assert (config.id2label, config.label2id) == ({0: "a", 1: "b", 2: "c"}, {"a": 0, "b": 1, "c": 2})
    config = SSLAMConfig.from_pretrained(tmp_path, num_labels=3)
    assert config.class_names == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert SSLAMConfig.from_pretrained(tmp_path, num_labels=2).class_names == list((former or {0: "LABEL_0", 1: "LABEL_1"}).values())


def test_a_saved_count_of_classes_that_does_not_fit_their_names_replaces_them(tmp_path):
    """As it always did; this package saves names alone."""
    saved = SSLAMConfig(id2label={0: "old", 1: "older"}).to_dict() | {"num_labels": 3}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert SSLAMConfig.from_pretrained(tmp_path).num_labels == 3


def test_names_of_classes_are_in_the_order_of_their_numbers():
    config = SSLAMConfig(id2label={1: "rain", 0: "dog"})
    assert config.class_names == ["dog", "rain"]
    config.id2label = {str(i): f"class {i}" for i in range(12)}  # as JSON has them: sorted as text, "10" would stand before "2"
    assert config.class_names == [f"class {i}" for i in range(12)]
    config.id2label = {0: "dog", 2: "rain"}
    with pytest.raises(ValueError, match="id2label has the keys 0, 2"):
        config.class_names  # noqa: B018
