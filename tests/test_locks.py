"""Two processes and one folder: the second is rejected at once, or waits where both want the same; a killed process leaves no lock."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import noise, tiny_config
from processes import Fork

from transformers_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMModel
from transformers_sslam.cli import main
from transformers_sslam.errors import UserError
from transformers_sslam.files import lock


soundfile = pytest.importorskip("soundfile")
pytest.importorskip("datasets")
from transformers_sslam.audio.batches import DataSettings  # noqa: E402
from transformers_sslam.audio.shards import ShardSettings, prepare  # noqa: E402
from transformers_sslam.evaluation.features import encode_clips, hash_waveforms  # noqa: E402
from transformers_sslam.pretraining.loop import PreTrainer  # noqa: E402
from transformers_sslam.pretraining.settings import PreTrainingSettings  # noqa: E402
from transformers_sslam.recordings.tag import TagSettings, tag_files  # noqa: E402


HOLD = "import sys, time; from transformers_sslam.files import lock\nwith lock(sys.argv[1]): print(1, flush=True); time.sleep(600)"


@pytest.fixture
def hold(tmp_path):
    """Starts processes that hold the lock of a path."""
    started, program, log = [], tmp_path / "hold.py", tmp_path / "hold.log"
    program.write_text(HOLD)

    def start(path: Path) -> Fork:
        started.append(Fork([program, path], log))
        while log.read_text() != "1\n" * len(started):
            assert started[-1].poll() is None, log.read_text()
            time.sleep(0.02)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def sounds(tmp_path) -> Path:
    (tmp_path / "sounds").mkdir()
    for number in range(4):
        soundfile.write(tmp_path / "sounds" / f"{number}.wav", noise(1.0, number), 16_000)
    return tmp_path / "sounds"


def tag(sounds: Path, output: Path) -> Path:
    SSLAMForAudioClassification(tiny_config()).save_pretrained(output.parent / "model")
    SSLAMFeatureExtractor(max_length=64).save_pretrained(output.parent / "model")
    model, tags = str(output.parent / "model"), str(output.with_suffix(".csv"))
    tag_files(TagSettings(model=model, inputs=str(sounds), output=tags, device="cpu"))
    return output.with_suffix(".csv")


def prepare_shards(sounds: Path, output: Path) -> Path:
    prepare(ShardSettings(str(output), data_dir=str(sounds)))
    return output / "shard-00000.parquet"


def pretrain(sounds: Path, output: Path) -> Path:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_length": 64}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_groups": 2}
    settings = PreTrainingSettings(
        **{"output_dir": str(output), "data": DataSettings(sources=[{"kind": "folder", "path": str(sounds)}]), "stage": 1},
        **{"model_config": sizes | decoder, "feature_extractor": {"max_length": 64}, "max_steps": 1, "warmup_steps": 0},
        **{"per_device_train_batch_size": 4, "dataloader_num_workers": 0, "report_to": "none"},
    )
    PreTrainer(settings).run()
    return output / "model" / "config.json"


@pytest.mark.parametrize("work", [tag, prepare_shards, pretrain])
def test_a_second_process_is_rejected_at_once_until_the_first_is_killed(hold, sounds, tmp_path, work):
    output = tmp_path / "output"
    locked = output.with_suffix(".parts") if work is tag else output
    (tmp_path / "link").symlink_to(tmp_path)  # the same place under another name
    first = hold(tmp_path / "link" / locked.name)
    with pytest.raises(UserError, match=f"another process writes to {locked}: wait for it, or choose another output"):
        work(sounds, output)
    assert first.poll() is None
    first.kill()
    first.wait()
    assert work(sounds, output).is_file()


@pytest.mark.parametrize("command", ["evaluate", "probe"])
def test_results_are_written_by_one_process_and_not_beside_a_model(command, tmp_path, capsys):
    arguments = [command, "--model", "absent", "--data_dir", "absent", "--output_dir", str(tmp_path / "out")]
    with lock(tmp_path / "out"):
        assert main(arguments) == 1
    assert f"another process writes to {tmp_path / 'out'}: wait for it" in capsys.readouterr().err
    (tmp_path / "out" / "config.json").touch()
    assert main(arguments) == 1
    assert "holds a model or its run, whose results would be replaced: choose another folder" in capsys.readouterr().err


def test_a_second_process_waits_for_the_features_that_the_first_encodes(hold, tmp_path):
    model, extractor, clips = SSLAMModel(tiny_config()).eval(), SSLAMFeatureExtractor(max_length=64), [noise(0.5), noise(0.6, 1)]
    encode = {"cache": tmp_path / "cache", "data_key": hash_waveforms(clips)}
    expected = np.array(encode_clips(model, extractor, clips, **encode).pooled("mean"))
    [folder] = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    (folder / "mean.npy").write_bytes(b"half")
    first, found = hold(folder), []
    waiting = threading.Thread(target=lambda: found.append(np.array(encode_clips(model, extractor, clips, **encode).pooled("mean"))))
    waiting.start()
    waiting.join(0.5)
    assert (waiting.is_alive(), found) == (True, [])
    first.kill()
    waiting.join(60)
    np.testing.assert_array_equal(found[0], expected)


def test_of_two_locks_in_one_process_the_second_is_rejected_too(tmp_path):
    with lock(tmp_path / "run"), pytest.raises(UserError, match="another process writes to .*run"), lock(tmp_path / "run"):
        pass
    with lock(tmp_path / "run"):
        pass
