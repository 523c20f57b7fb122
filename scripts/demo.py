"""Train a small SSLAM classifier on made-up sounds, then let a fresh process classify a new one.

python scripts/demo.py            # about two minutes on 2 CPU cores, no network, no data needed
python scripts/demo.py my_folder  # where to put the sounds and the model; runs/demo by default
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile


SCRIPTS = Path(__file__).resolve().parent
SAMPLING_RATE = 16_000
SECONDS = 2.0
CLIPS = {"train": 40, "test": 20}  # of each class
TIME = np.arange(round(SECONDS * SAMPLING_RATE)) / SAMPLING_RATE

# The fresh process knows the model only by its folder. It prints label and score of each class as JSON.
CLASSIFY = """
import json, sys
from transformers import pipeline
from transformers_sslam.data.decoding import load_waveform
print(json.dumps(pipeline("audio-classification", model=sys.argv[1], top_k=None)(load_waveform(sys.argv[2]))))
"""


def chirp(generator: np.random.Generator) -> np.ndarray:
    """A tone that glides up or down, over and over."""
    low, period = generator.uniform(200, 800), generator.uniform(0.3, 1.0)
    position = (TIME / period) % 1
    octaves = generator.uniform(1, 2.5) * (position if generator.random() < 0.5 else 1 - position)
    return np.sin(2 * np.pi * np.cumsum(low * 2**octaves) / SAMPLING_RATE)


def clicks(generator: np.random.Generator) -> np.ndarray:
    """Short decaying pulses at a steady rate."""
    since_click = (TIME + generator.uniform(0, 1)) % generator.uniform(0.1, 0.4)
    return np.exp(-since_click / 0.002) * np.sin(2 * np.pi * generator.uniform(1500, 4000) * since_click)


def noise_bursts(generator: np.random.Generator) -> np.ndarray:
    """White noise that comes and goes."""
    phase = (TIME / generator.uniform(0.3, 0.8) + generator.uniform(0, 1)) % 1
    return generator.standard_normal(len(TIME)) * (phase < generator.uniform(0.3, 0.6)) / 3


def pluck(generator: np.random.Generator) -> np.ndarray:
    """A plucked string (Karplus and Strong 1983): noise that runs round a delay line and loses its edges."""
    sound = np.zeros(len(TIME))
    for start in generator.choice(8, size=3, replace=False) * len(TIME) // 8:
        line = generator.uniform(-1, 1, size=round(SAMPLING_RATE / generator.uniform(100, 400)))
        for begin in range(start, len(sound), len(line)):
            end = min(begin + len(line), len(sound))
            sound[begin:end] += line[: end - begin]
            line = 0.498 * (line + np.roll(line, 1))
    return sound


def alarm(generator: np.random.Generator) -> np.ndarray:
    """Two square-wave tones in turn."""
    low, swap = generator.uniform(600, 1200), generator.uniform(0.1, 0.4)
    frequency = np.where(TIME // swap % 2 == 0, low, low * generator.uniform(1.2, 1.6))
    return np.sign(np.sin(2 * np.pi * np.cumsum(frequency) / SAMPLING_RATE)) / 2


def engine(generator: np.random.Generator) -> np.ndarray:
    """A low hum with its harmonics, trembling."""
    pitch = generator.uniform(40, 90)
    hum = sum(np.sin(2 * np.pi * k * pitch * TIME + generator.uniform(0, 6)) / k for k in range(1, 12))
    return hum * (1 + 0.5 * np.sin(2 * np.pi * generator.uniform(4, 12) * TIME)) / 3


SOUNDS = {sound.__name__: sound for sound in (alarm, chirp, clicks, engine, noise_bursts, pluck)}


def make_sound(name: str, generator: np.random.Generator) -> np.ndarray:
    """(samples,), in [-1, 1]: one sound of a class, at a random level, over faint noise."""
    clean = SOUNDS[name](generator)
    level, background = generator.uniform(0.2, 0.7), generator.uniform(0.001, 0.02)
    return np.clip(level * clean / np.abs(clean).max() + background * generator.standard_normal(len(clean)), -1, 1)


def make_data_set(folder: Path) -> None:
    """Write `train/` and `test/` with a folder for each class: what `datasets` calls an audiofolder."""
    for split, (part, clips) in enumerate(CLIPS.items()):
        for index, name in enumerate(SOUNDS):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for clip in range(clips):
                sound = make_sound(name, np.random.default_rng((split, index, clip)))
                soundfile.write(folder / part / name / f"{clip:03}.wav", sound, SAMPLING_RATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/demo"), help="for sounds and model")
    folder = parser.parse_args().folder
    model, new_sound = folder / "model", folder / "new_sound.wav"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}

    print(f"1. Making {sum(CLIPS.values())} sounds of each kind: {', '.join(SOUNDS)}", flush=True)
    make_data_set(folder / "sounds")

    print("2. Training a small SSLAM classifier from scratch", flush=True)
    settings = [f"data_dir={folder / 'sounds'}", f"output_dir={model}", "overwrite=true"]
    subprocess.run([sys.executable, SCRIPTS / "finetune.py", SCRIPTS / "recipes" / "demo.yaml", *settings], env=environment, check=True)

    print("3. Classifying a new sound in a fresh process", flush=True)
    truth = "pluck"
    soundfile.write(new_sound, make_sound(truth, np.random.default_rng(len(CLIPS))), SAMPLING_RATE)
    fresh = subprocess.run(
        [sys.executable, "-c", CLASSIFY, model, new_sound], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    scores = json.loads(fresh.stdout)
    results = json.loads((model / "results.json").read_text())

    print(f"\nHeld-out accuracy: {results['metrics']['accuracy']:.1%} of {results['clips']['evaluation']} sounds", end="")
    print(f" (chance {1 / len(SOUNDS):.1%}), after {results['seconds']['training']:.0f} s of training")
    print(f"A new sound, {new_sound}, is really: {truth}. The model says:")
    for entry in scores:
        print(f"  {entry['label']:<13} {entry['score']:.3f} {'#' * round(40 * entry['score'])}")
    print(f"\nThe model lies in {model}. Try it on any file:\n")
    print("from transformers import pipeline")
    print("from transformers_sslam.data.decoding import load_waveform")
    print(f'print(pipeline("audio-classification", model="{model}")(load_waveform("{new_sound}")))')
    if scores[0]["label"] != truth:
        sys.exit(f"\nThe new sound was taken for {scores[0]['label']}: the demonstration failed")


if __name__ == "__main__":
    main()
