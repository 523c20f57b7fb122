"""Fine-tuning over folds and seeds: which runs are made, which are not made again, and what they say together."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import soundfile
import yaml

from transformers_sslam.errors import UserError
from transformers_sslam.evaluation.intervals import summarize
from transformers_sslam.files import SEAL
from transformers_sslam.finetuning.repeats import expand, format_runs, repeat_fine_tuning
from transformers_sslam.finetuning.settings import FineTuningSettings


RUNS = ["fold-1-seed-0", "fold-1-seed-1", "fold-2-seed-0", "fold-2-seed-1", "fold-3-seed-0", "fold-3-seed-1"]


@pytest.fixture(scope="module")
def series(tmp_path_factory) -> tuple[FineTuningSettings, dict]:
    """Three folds of three clips by two seeds, and their summary."""
    root = tmp_path_factory.mktemp("series")
    (root / "clips").mkdir()
    lines = ["file_name,label,fold"]
    draws = np.random.default_rng(0)
    for i, (label, fold) in enumerate((label, fold) for fold in (1, 2, 3) for label in ("a", "b", "b")):
        soundfile.write(root / "clips" / f"{i}.wav", draws.standard_normal(6000) / 10, 16_000)
        lines.append(f"{i}.wav,{label},{fold}")
    (root / "clips" / "metadata.csv").write_text("\n".join(lines))
    settings = FineTuningSettings(
        data_dir=str(root / "clips"),
        output_dir=str(root / "runs"),
        fold_column="fold",
        cross_validate=True,
        seeds=[0, 1],
        model_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "max_length": 32},
        max_length=32,
        per_device_train_batch_size=6,
        max_steps=1,
        disable_tqdm=True,
    )
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = root / "cache"
    yield settings, repeat_fine_tuning(settings)
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture
def copy(series, tmp_path) -> FineTuningSettings:
    """The series in a folder of its own, with two of its runs: fold 1, held out with either seed."""
    settings, _ = series
    (tmp_path / "runs").mkdir()
    changes = {"test_folds": [1], "output_dir": str(tmp_path / "runs")}
    for name in RUNS[:2]:
        shutil.copytree(Path(settings.output_dir) / name, tmp_path / "runs" / name)
        file = tmp_path / "runs" / name / "settings.yaml"
        file.write_text(file.read_text().replace(settings.output_dir, changes["output_dir"]))
    return replace(settings, **changes)


def made(settings: FineTuningSettings) -> dict[str, int]:
    """When each run's model was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in sorted(Path(settings.output_dir).glob("*/model.safetensors"))}


def test_each_fold_is_held_out_in_turn_with_each_seed(series):
    settings, _ = series
    assert list(made(settings)) == RUNS
    for name in RUNS:
        run = yaml.safe_load((Path(settings.output_dir) / name / "settings.yaml").read_text())
        fold, seed = int(name[5]), int(name[-1])
        assert run["test_folds"] == [fold]
        assert run["train_folds"] == [other for other in (1, 2, 3) if other != fold]
        assert (run["seed"], run["seeds"], run["cross_validate"]) == (seed, [], False)
        results = json.loads((Path(settings.output_dir) / name / "results.json").read_text())
        assert results["clips"] == {"training": 6, "test": 3}


def test_the_summary_is_that_of_the_runs_results(series):
    """Against scipy's own interval."""
    settings, summary = series
    results = {name: json.loads((Path(settings.output_dir) / name / "results.json").read_text()) for name in RUNS}
    for metric in ("accuracy", "loss"):
        values = [results[name]["metrics"][metric] for name in RUNS]
        found = summary["metrics"][metric]
        assert found["runs"] == dict(zip(RUNS, values))
        assert found["mean"] == pytest.approx(sum(values) / 6, rel=1e-12)
        folds = np.reshape(values, (3, 2)).mean(1)  # both seeds of a fold were tested on the same clips
        assert found["count"] == 3
        assert found["std"] == pytest.approx(np.std(folds, ddof=1), rel=1e-9)
        low, high = scipy.stats.t.interval(0.95, 2, np.mean(folds), scipy.stats.sem(folds)) if found["std"] else (values[0],) * 2
        if metric == "accuracy":  # every run takes one clip of three: an interval over folds alone would have no width
            assert set(values) == {1 / 3}
            one_of_three = scipy.stats.binomtest(1, 3).proportion_ci(method="wilson")
            low, high = (1 / 3 + (end - 1 / 3) / 3**0.5 for end in (one_of_three.low, one_of_three.high))
        assert (found["low"], found["high"]) == pytest.approx((low, high), rel=1e-9)
    assert summary["metrics"]["loss"]["std"] > 0
    assert summary["seconds"] == pytest.approx(sum(result["seconds"]["total"] for result in results.values()))
    assert json.loads((Path(settings.output_dir) / "summary.json").read_text()) == summary
    assert yaml.safe_load((Path(settings.output_dir) / "series.yaml").read_text())["seeds"] == [0, 1]


def test_results_by_class_are_those_of_all_runs(series):
    settings, summary = series
    output = Path(settings.output_dir)
    matrices = [json.loads((output / name / "results.json").read_text())["confusion_matrix"] for name in RUNS]
    assert summary["confusion_matrix"] == np.sum(matrices, axis=0).tolist()
    assert [result["clips"] for result in summary["per_class"].values()] == [6, 12]  # three folds by two seeds
    assert (output / "confusion_matrix.png").stat().st_size > 5000


def test_the_table_has_a_line_for_each_run_and_one_for_all():
    values = {"one": 0.5, "two": 0.7, "three": 0.9}
    accuracy = {"runs": values, **summarize(list(values.values())).to_dict()}
    lines = format_runs({"metrics": {"accuracy": accuracy}, "classes_without_positives": {"two": ["dog"]}}).splitlines()
    assert lines[0] == "| run | accuracy |"
    assert lines[2:5] == ["| one | 0.5000 |", "| two | 0.7000 |", "| three | 0.9000 |"]
    half = 4.302653 * 0.2 / 3**0.5  # Student's t for two degrees of freedom
    assert lines[5] == f"| mean ± std [95 %] | 0.7000 ± 0.2000 [{0.7 - half:.4f}, {0.7 + half:.4f}] |"
    assert lines[6:] == ["two leaves out dog, of which it has no clip"]
    single = {"accuracy": {"runs": {"": 0.5}, **summarize([0.5]).to_dict()}}
    assert format_runs({"metrics": single, "classes_without_positives": {}}).splitlines()[0::2] == ["| accuracy |", "| 0.5000 |"]
    single["accuracy"] |= {"low": 0.25, "high": 0.75}
    lines = format_runs({"metrics": single, "classes_without_positives": {}}).splitlines()
    assert lines[0::2] == ["| accuracy [95 % over clips] |", "| 0.5000 [0.2500, 0.7500] |"]


def test_without_evaluation_there_is_no_table(copy, tmp_path):
    single = {"cross_validate": False, "test_folds": [], "train_folds": [1], "seeds": [], "do_eval": False}
    summary = repeat_fine_tuning(replace(copy, output_dir=str(tmp_path / "single"), **single))
    assert summary["metrics"] == {}
    assert format_runs(summary) == "nothing was evaluated"
    assert "not tested" in (tmp_path / "single" / "README.md").read_text()


def test_finished_runs_are_not_made_again(series, copy):
    before = made(copy)
    summary = repeat_fine_tuning(copy)
    assert made(copy) == before
    assert summary["metrics"]["loss"]["runs"] == {name: series[1]["metrics"]["loss"]["runs"][name] for name in RUNS[:2]}


def test_another_spelling_of_a_path_is_the_same_run(copy):
    before = made(copy)
    repeat_fine_tuning(replace(copy, data_dir=f"{Path(copy.data_dir).parent}/./clips/"))
    assert made(copy) == before


def test_results_that_were_changed_are_not_believed(series, copy, caplog):
    file, before = Path(copy.output_dir) / RUNS[0] / "results.json", made(copy)
    results = json.loads(file.read_text())
    results["metrics"]["accuracy"] = 0.9
    file.write_text(json.dumps(results))
    summary = repeat_fine_tuning(copy)
    assert f"{file} is damaged: it was changed since it was written" in caplog.text
    assert summary["metrics"]["accuracy"]["runs"][RUNS[0]] == series[1]["metrics"]["accuracy"]["runs"][RUNS[0]]
    assert [made(copy)[name] > before[name] for name in RUNS[:2]] == [True, False]


def test_runs_of_earlier_versions_which_did_not_seal_results_are_finished(copy):
    file, before = Path(copy.output_dir) / RUNS[0] / "results.json", made(copy)
    results = json.loads(file.read_text())
    del results[SEAL]
    file.write_text(json.dumps(results))
    repeat_fine_tuning(copy)
    assert made(copy) == before


def test_a_series_goes_on_where_it_was_interrupted(series, copy):
    """Before a run, and in the middle of one: its model is saved, its results are not written."""
    first, second = (Path(copy.output_dir) / name for name in RUNS[:2])
    shutil.rmtree(second)
    (first / "results.json").unlink()
    before = made(copy)
    summary = repeat_fine_tuning(copy)
    assert made(copy)[RUNS[0]] > before[RUNS[0]]
    expected = {name: series[1]["metrics"]["loss"]["runs"][name] for name in RUNS[:2]}
    assert summary["metrics"]["loss"]["runs"] == pytest.approx(expected, rel=1e-6)
    before = made(copy)
    repeat_fine_tuning(copy)
    assert made(copy) == before


def test_further_seeds_add_runs(copy):
    before = made(copy)
    summary = repeat_fine_tuning(replace(copy, seeds=[0, 1, 2]))
    assert list(summary["metrics"]["loss"]["runs"]) == [*RUNS[:2], "fold-1-seed-2"]
    assert made(copy).items() > before.items()


def test_changed_data_are_refused_or_run_again(copy, tmp_path):
    data = Path(shutil.copytree(copy.data_dir, tmp_path / "clips"))
    moved = replace(copy, data_dir=str(data), seeds=[0], overwrite_output_dir=True)
    repeat_fine_tuning(moved)
    again, before = replace(moved, overwrite_output_dir=False, memory_gb=1.0), made(copy)
    repeat_fine_tuning(again)
    assert made(copy) == before
    table = (data / "metadata.csv").read_text()
    (data / "metadata.csv").write_text(table.replace("1.wav,b,1", "1.wav,a,1"))
    with pytest.raises(UserError, match="holds a model already, of a run with other data: "):
        repeat_fine_tuning(again)
    assert made(copy) == before


def test_other_audio_in_parquet_is_other_data(copy, tmp_path):
    clips = pd.read_csv(Path(copy.data_dir) / "metadata.csv")
    audio = [{"path": name, "bytes": (Path(copy.data_dir) / name).read_bytes()} for name in clips.pop("file_name")]
    (tmp_path / "data").mkdir()
    clips.assign(audio=audio).to_parquet(tmp_path / "data" / "train.parquet")
    run = replace(copy, data_dir=str(tmp_path / "data"), layout="parquet", seeds=[], output_dir=str(tmp_path / "held"))
    repeat_fine_tuning(run)
    before = made(run)
    results = tmp_path / "held" / "fold-1" / "results.json"
    found = json.loads(results.read_text())
    del found[SEAL]
    results.write_text(json.dumps(found | {"data": found["data"].partition("+")[0]}))  # of an earlier version
    repeat_fine_tuning(run)
    results.write_text(json.dumps(found))
    repeat_fine_tuning(run)
    assert made(run) == before
    clips.assign(audio=[audio[1], *audio[1:]]).to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(UserError, match="holds a model already, of a run with other data: "):
        repeat_fine_tuning(run)


def test_a_fold_that_cannot_work_is_refused_before_the_first_run(copy, tmp_path):
    data = Path(shutil.copytree(copy.data_dir, tmp_path / "clips"))
    table = (data / "metadata.csv").read_text()
    (data / "metadata.csv").write_text(table.replace("8.wav,b,3", "8.wav,owl,3"))
    settings = replace(copy, data_dir=str(data), test_folds=[], output_dir=str(tmp_path / "others"))
    with pytest.raises(UserError, match="8.wav is labelled 'owl', which is none of the 2 classes"):
        repeat_fine_tuning(settings)
    assert not (tmp_path / "others").exists()


def test_changed_settings_are_refused_or_run_again(copy):
    changed, before = replace(copy, learning_rate=1e-3), made(copy)
    with pytest.raises(UserError, match="fold-1-seed-0 holds a model already, of a run with other learning_rate: .*overwrite_output_dir"):
        repeat_fine_tuning(changed)
    assert made(copy) == before
    repeat_fine_tuning(replace(changed, overwrite_output_dir=True))
    after = made(copy)
    assert all(after[name] > before[name] for name in before)
    repeat_fine_tuning(changed)  # which are finished now
    assert made(copy) == after


def test_a_fold_that_is_not_there_is_an_error_before_the_first_run(copy, tmp_path):
    settings = replace(copy, test_folds=[1, 7], output_dir=str(tmp_path / "none"))
    with pytest.raises(UserError, match="the column 'fold' has no fold 7, only 1, 2, 3"):
        repeat_fine_tuning(settings)
    assert not (tmp_path / "none").exists()


def test_one_run_lies_in_the_folder_itself(copy):
    single = replace(copy, cross_validate=False, train_folds=[2], seeds=[])
    assert expand(single) == {"": single}
    assert list(expand(replace(single, seeds=[3]))) == ["seed-3"]
    assert list(expand(replace(copy, seeds=[], test_folds=["2"]))) == ["fold-2"]
    assert expand(replace(copy, seeds=[], test_folds=["2"]))["fold-2"].train_folds == [1, 3]


def test_folds_of_the_validation_part_are_not_held_out(copy):
    runs = expand(replace(copy, test_folds=[], validation_folds=["3"], eval_strategy="epoch", seeds=[]))
    assert {name: (run.train_folds, run.validation_folds, run.test_folds) for name, run in runs.items()} == {
        "fold-1": ([2], [3], [1]),
        "fold-2": ([1], [3], [2]),
    }


def test_folds_are_the_same_in_any_notation(copy):
    runs = expand(replace(copy, test_folds=["1.0"], validation_folds=["03"], eval_strategy="epoch", seeds=[]))
    assert {name: (run.train_folds, run.validation_folds, run.test_folds) for name, run in runs.items()} == {"fold-1": ([2], [3], [1])}


@pytest.mark.parametrize("changes", [{"push_to_hub": True}, {"resume_from_checkpoint": "runs/checkpoint-3"}])
def test_what_concerns_one_run_is_rejected_for_several(copy, changes):
    with pytest.raises(UserError, match="is set, but there are 2 runs: choose one of them"):
        expand(replace(copy, **changes))


@pytest.mark.parametrize(("name", "values"), [("seeds", [1, 1]), ("test_folds", [1, "01"])])
def test_the_same_run_twice_is_an_error(copy, name, values):
    with pytest.raises(UserError, match=f"{name}.*give each once"):
        replace(copy, **{name: values})
