"""Speed is measured fairly, and bought with nothing: fast, plain and compiled updates compute the same."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from torch import nn

from transformers_sslam import allocator


pytest.importorskip("accelerate")
pytest.importorskip("soundfile")
from conftest import relative_error
from data import measure_data
from encode import measure_encoder
from processes import Fork
from recording import blocks, measure_recording
from step import LOSSES, StepSettings, Update, measure_step, summary
from timing import MatrixProducts, interleave, ratio, spread


CPU = torch.device("cpu")
SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmarks" / "__main__.py"
ALLOCATOR = Path(allocator.__file__)
SMALL = {"size": "tiny", "batch_size": 2, "frames": 512, "views": 2}


# --- the same numbers


@pytest.mark.parametrize("stage", [1, 2])
def test_fast_and_plain_updates_agree(stage):
    settings = StepSettings(**SMALL, stage=stage)
    fast, plain = Update(settings), Update(settings, plain=True)
    for _ in range(3):
        for update in (fast, plain):
            update.forward()
            update.backward()
        gradients = [torch.cat([p.grad.flatten() for p in update.model.parameters() if p.requires_grad]) for update in (fast, plain)]
        assert relative_error(*gradients) < 1e-5
        for name in (*LOSSES, "target_std", "prediction_std", "content_share"):
            if name in fast.output:
                assert fast.output[name].item() == pytest.approx(plain.output[name].item(), rel=1e-5), name
        for update in (fast, plain):
            update.step()
            update.move_teacher()
    for a, b in zip(fast.model.teacher.parameters(), plain.model.teacher.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_an_update_in_bfloat16_has_the_losses_of_a_plain_one_in_float32():
    settings = StepSettings(**SMALL, precision="bfloat16")
    fast, plain = Update(settings), Update(settings, plain=True)
    assert (fast.precision, plain.precision) == ("bfloat16", "float32")
    for _ in range(3):
        fast()
        plain()
        assert fast.output.predictions is None  # what is not asked for is not kept
        for name, expected in plain.losses().items():
            assert fast.losses()[name] == pytest.approx(expected, rel=1e-3), name


@pytest.mark.slow
@pytest.mark.parametrize("generates_code", [False, True])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_a_compiled_update_agrees_and_is_compiled_once(generates_code, request):
    if not generates_code:
        request.getfixturevalue("without_code_generation")
    torch._dynamo.reset()  # what other tests compiled, of other sizes
    compiled, plain = Update(StepSettings(**SMALL, compile=True)), Update(StepSettings(**SMALL), plain=True)
    for _ in range(3):
        compiled()
        plain()
        for name, expected in plain.losses().items():
            assert compiled.losses()[name] == pytest.approx(expected, rel=1e-4), name


# --- fair measures


def test_candidates_run_in_turns_and_warm_up_first():
    order = []
    seconds = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2, warmup=1, device=CPU)
    assert order == ["a", "b"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_ratios_are_taken_run_by_run():
    # The machine was three times as slow during the second pair: the ratio of medians, 4.5 / 2, would not be what each pair says.
    assert ratio([2.0, 6.0, 3.0], [1.0, 3.0, 1.5]).to_dict() == {"median": 2.0, "smallest": 2.0, "largest": 2.0, "runs": 3}


def test_a_spread_of_times_becomes_one_of_rates():
    rates = spread([0.5, 0.25, 1.0]).inverse(2)
    assert (rates.median, rates.smallest, rates.largest) == (4.0, 2.0, 8.0)
    assert str(spread([0.5, 0.25, 1.0]).scaled(1000)) == "500 (250 - 1000)"


def test_the_floor_is_made_of_matrix_products_alone(monkeypatch):
    timed = []
    monkeypatch.setattr("timing.timed", lambda run, device: (timed.append(run()), 2.0 + len(timed))[1])
    a = torch.randn(1, 2, 8, 4, requires_grad=True)
    with MatrixProducts(CPU) as products:
        b = nn.functional.gelu(a) + 1
        nn.functional.scaled_dot_product_attention(b, b, b)
        nn.functional.conv2d(b, torch.randn(3, 2, 1, 1)).exp()
        (b @ b.transpose(2, 3)).softmax(-1).sum().backward()
    # Attention, convolution, a product forward and two backward.
    assert len(timed) == 5
    assert products.seconds == 3 + 4 + 5 + 6 + 7


@pytest.mark.slow
def test_an_update_is_measured_whole_and_in_parts():
    results = measure_step(StepSettings(**SMALL, repeats=3), baseline=True, memory=False)
    seconds = results["seconds"]
    assert [*seconds] == ["update", *Update.PARTS, "drawing 4 masks"]
    assert seconds["update"].runs == 3
    # Loosely, for machines are busy: the parts make the whole.
    assert 0.1 < sum(seconds[part].smallest for part in Update.PARTS) / seconds["update"].smallest < 10
    assert results["clips_per_second"].median == pytest.approx(2 / seconds["update"].median)
    assert results["utilisation"].median == pytest.approx(results["flops"] / seconds["update"].median / results["peak_flops_per_second"])
    assert 0 < results["floor_seconds"].median < 5 * seconds["update"].median
    assert results["share_of_floor"].runs == results["floor_seconds"].runs == 3
    assert 0 < results["share_of_floor"].smallest <= results["share_of_floor"].largest < 1
    assert results["difference"] < 1e-5
    rows = summary(results)
    assert rows[0][0] == "update, ms"
    assert rows[0][3] == str(results["speedup"])
    assert all(len(row) == 4 for row in rows)


def test_both_encoders_are_timed_on_the_same_clips():
    (row,) = measure_encoder("tiny", [2], frames=128, repeats=2)
    assert row["batch_size"] == 2
    assert {name: rate.runs for name, rate in row["clips_per_second"].items()} == {"SSLAM": 2, "AST": 2}


def test_a_made_up_recording_has_its_length():
    assert [len(block) for block in blocks(0.4, block_seconds=10)] == [160_000, 160_000, 64_000]


@pytest.mark.slow
def test_a_longer_recording_takes_no_more_memory():
    results = measure_recording("tiny", 40)
    assert results["windows"] == 235
    assert results["peak memory, GiB"] < results["of a quarter of it, GiB"] * 1.05


@pytest.mark.slow
def test_the_input_path_is_measured():
    rows = measure_data(batch_size=2, batches=1, recordings=2, resume_after=[3], repeats=1)
    assert [row["what"] for row in rows] == [
        *("folder wav", "folder flac", "folder ogg", "parquet shards"),
        *("manifest, after 3 clips", "parquet, after 3 clips"),
    ]
    assert all(row["clips a second by the clock"].median > 0 for row in rows[:4])
    assert all(0 < row["ms of the main process a batch beside 2 workers"].median < 1000 for row in rows[:4])


@pytest.mark.parametrize(
    ("command", "rows"),
    [
        (["features", "--clips", "2", "--seconds", "1", "--repeats", "2"], 4),
        pytest.param(["step", "--size", "tiny", "--frames", "512", "--repeats", "2", "--baseline"], None, marks=pytest.mark.slow),
        pytest.param(["recording", "--size", "tiny", "--minutes", "1"], None, marks=pytest.mark.slow),
    ],
)
def test_the_script_prints_a_table_and_writes_json(tmp_path, command, rows):
    done = Fork([SCRIPT, *command, "--json", tmp_path / "speed.json"], tmp_path / "log")
    assert done.wait() == 0, (tmp_path / "log").read_text()
    written = json.loads((tmp_path / "speed.json").read_text())
    assert written["machine"]["torch"] == torch.__version__
    assert (tmp_path / "log").read_text().count("\n| ") >= (rows or 1)
    if rows is not None:
        assert len(written["results"]) == rows
        assert all(row["milliseconds"]["runs"] == 2 for row in written["results"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--device", "abacus"], "'abacus' cannot be used here"),
        (["encode", "--batch-sizes", "0"], "0 is not at least 1"),
        (["features", "--seconds", "0.01"], "0.01 is not at least 0.025"),
        (["data", "--resume-after", "-5"], "-5"),
        (["data", "--source", "{path: /data}"], "a source is {'path': '/data'}, but must be a mapping with kind and path"),
        (["data", "--source", "foo"], "a source is 'foo', but must be a mapping with kind and path"),
        (["step", "--size", "tiny", "--frames", "100"], "input_values has 100 frames, but a positive multiple of 16"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert message in capsys.readouterr().err + str(stopped.value)


# --- memory is kept


FAULTS = f"""
import ctypes, resource, runpy, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages would come in one fault each
print(runpy.run_path({str(ALLOCATOR)!r})["keep_freed_memory"]())
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(10_000_000)  # 40 MB: up to 32 MB glibc itself learns to keep
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(20)  # the heap takes some rounds to settle
print(faults(4), resource.getpagesize())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="is about glibc")
@pytest.mark.parametrize("decided", [False, True])
def test_freed_memory_is_kept_unless_the_environment_decides(decided, monkeypatch):
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    if decided:
        monkeypatch.setenv("MALLOC_TOP_PAD_", "131072")
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    kept, faults, page = done.stdout.split()
    assert kept == str(not decided)
    pages = 4 * 40_000_000 / int(page)  # each of which is fetched anew unless they are kept
    assert int(faults) < 0.05 * pages if kept == "True" else int(faults) > 0.8 * pages
