"""What the small model of this repository detects, and the start of a pre-training, on sounds that are made up here.

python scripts/demo.py                        # under a minute on 2 CPU cores, no network, no data needed
python scripts/demo.py --file recording.wav   # your own recording alone, of any length, rate and number of channels
"""

import argparse
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers reads it: nothing here needs a network

import numpy as np
import soundfile
import torch
import transformers

from transformers_sslam import SSLAMFeatureExtractor, SSLAMForAudioFrameClassification
from transformers_sslam.audio import load_waveform
from transformers_sslam.audio.labels import Event
from transformers_sslam.errors import AudioDecodingError
from transformers_sslam.events_sslam import EventSettings, find_events
from transformers_sslam.recordings.plot import plot_events


MODEL = Path(__file__).resolve().parents[1] / "model_cards" / "sslam-small-everyday"
SAMPLING_RATE = 16_000
SECONDS = 5.0
SAMPLES = round(SECONDS * SAMPLING_RATE)
TIME = np.arange(SAMPLES) / SAMPLING_RATE
TRAINING_CLIPS = 8  # of each kind, for the pre-training
AVERAGED = 10  # updates in a mean loss
# A recording in which sounds follow each other and overlap: kind and where it begins, in seconds. Each lasts SECONDS.
SCENE = (("sea_waves", 0), ("crackling_fire", 5), ("clock_tick", 10), ("rooster", 13), ("rain", 18), ("crying_baby", 20))


# --- sounds. Each function gives (SAMPLES,), at any scale. They imitate what makes the real sound, not any recording.


def band_noise(generator: np.random.Generator, low: float, high: float) -> np.ndarray:
    """Noise that fades softly below `low` and above `high` (Hz), by 12 and 6 dB an octave; deviation 1."""
    frequencies = np.fft.rfftfreq(SAMPLES, 1 / SAMPLING_RATE)[1:]
    gain = 1 / (1 + (low / frequencies) ** 2) / np.sqrt(1 + (frequencies / high) ** 2)
    noise = np.fft.irfft(np.fft.rfft(generator.standard_normal(SAMPLES)) * np.append(0, gain), SAMPLES)
    return noise / noise.std()


def impacts(starts: np.ndarray, amplitudes: np.ndarray, decays: np.ndarray, pitches: np.ndarray) -> np.ndarray:
    """Struck resonances: decaying sines that begin at `starts` (s), with their `decays` (s) and `pitches` (Hz)."""
    sound = np.zeros(SAMPLES)
    for start, amplitude, decay, pitch in zip(starts, amplitudes, decays, pitches):
        first = round(start * SAMPLING_RATE)
        since = TIME[: min(SAMPLES - first, round(8 * decay * SAMPLING_RATE))]
        sound[first : first + len(since)] += amplitude * np.exp(-since / decay) * np.sin(2 * np.pi * pitch * since)
    return sound


def voice(pitch: np.ndarray, formants: tuple[float, ...], roughness: float, generator: np.random.Generator) -> np.ndarray:
    """Harmonics of a moving `pitch` (Hz, at each sample), strongest near the `formants` (Hz), with some breath."""
    pitch = pitch * (1 + roughness * band_noise(generator, 20, 80))
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLING_RATE
    sound = np.zeros(SAMPLES)
    for k in range(1, 24):
        frequency = k * pitch
        gain = sum(1 / (1 + ((frequency - formant) / (0.15 * formant + 80)) ** 2) for formant in formants) + 0.05
        sound += np.where(frequency < SAMPLING_RATE / 2, gain, 0) * np.sin(k * phase) / np.sqrt(k)
    return sound


def rain(generator: np.random.Generator) -> np.ndarray:
    """The hiss of countless far drops, and near ones apart from it."""
    drops = 1500
    near = impacts(
        np.sort(generator.uniform(0, SECONDS, drops)),
        generator.pareto(2.5, drops),
        generator.uniform(0.001, 0.004, drops),
        generator.uniform(1500, 7000, drops),
    )
    return band_noise(generator, 200, 2000) + 0.7 * near


def sea_waves(generator: np.random.Generator) -> np.ndarray:
    """A low roar that swells and breaks, brighter as it is louder."""
    period, phase = generator.uniform(5, 9), generator.uniform(0, 1)
    swell = (0.5 + 0.5 * np.sin(2 * np.pi * (TIME / period + phase))) ** 2
    return (0.3 + swell) * band_noise(generator, 50, 200) + 0.5 * swell**2 * band_noise(generator, 1000, 4000)


def clock_tick(generator: np.random.Generator) -> np.ndarray:
    """Tick and tock in turn, each a knock on small metal parts."""
    starts = np.arange(generator.uniform(0, 0.3), SECONDS, generator.choice([0.2, 0.25, 0.5]))
    tock = np.arange(len(starts)) % 2
    parts = [generator.uniform(low, high) for low, high in ((900, 1800), (2200, 3500), (4000, 6500))]
    knocks = sum(
        impacts(starts, (1 - 0.3 * tock) / (i + 1), np.full(len(starts), 0.012 / (i + 1)), pitch * (1 - 0.12 * tock))
        for i, pitch in enumerate(parts)
    )
    return knocks + 0.002 * band_noise(generator, 50, 500)


def crackling_fire(generator: np.random.Generator) -> np.ndarray:
    """Snaps at random, few of them loud, over a soft low roar."""
    snaps = generator.poisson(14 * SECONDS)
    loudness = generator.pareto(1.5, snaps).clip(max=12)
    starts, decays = generator.uniform(0, SECONDS, snaps), generator.uniform(0.0005, 0.003, snaps)
    crackle = sum(impacts(starts, loudness, decays, generator.uniform(800, 7000, snaps)) for _ in range(3))
    return crackle + 0.3 * band_noise(generator, 30, 200)


def helicopter(generator: np.random.Generator) -> np.ndarray:
    """Blades that slap the air a dozen times a second, and the rush of the turbine."""
    phase = (TIME * generator.uniform(10, 16)) % 1
    slap = np.exp(-phase / 0.2)
    return slap * band_noise(generator, 30, 200) + 0.1 * (0.5 + slap) * band_noise(generator, 300, 2000)


def chainsaw(generator: np.random.Generator) -> np.ndarray:
    """A two-stroke engine that is revved: a pulse at each turn, unsteady, through a rattling exhaust."""
    rev = 0.5 + 0.5 * np.sin(2 * np.pi * TIME / generator.uniform(1.5, 4) + generator.uniform(0, 6))
    turns = np.cumsum((70 + 70 * rev) * (1 + 0.03 * band_noise(generator, 2, 30))) / SAMPLING_RATE
    pulse = np.exp(-(turns % 1) / 0.1)
    exhaust = sum(np.sin(2 * np.pi * k * turns) / k**0.5 for k in range(1, 40))
    return (0.4 + 0.6 * rev) * (exhaust + pulse * band_noise(generator, 300, 3000))


def rooster(generator: np.random.Generator) -> np.ndarray:
    """Cock-a-doodle-doo: two short notes, a high one and a long falling one."""
    top, start = generator.uniform(750, 1000), generator.uniform(0.2, 2.2)
    times = start + np.array([0, 0.18, 0.2, 0.3, 0.36, 0.6, 0.7, 0.8, 1.6, 2.2])
    pitch = np.interp(TIME, times, top * np.array([0.6, 0.65, 0.6, 0.75, 0.8, 0.95, 1, 1, 0.9, 0.6]))
    level = np.interp(TIME, times, [0, 0.7, 0.1, 0.7, 0.1, 0.9, 0.6, 1, 0.9, 0])
    return level * voice(pitch, (1100, 2600, 4200), 0.01, generator) + 0.003 * band_noise(generator, 50, 500)


def crying_baby(generator: np.random.Generator) -> np.ndarray:
    """Cries of most of a second, rising and falling, with gasps between."""
    period, top = generator.uniform(0.9, 1.3), generator.uniform(420, 560)
    phase = (TIME / period + generator.uniform(0, 1)) % 1
    arc = np.sin(np.pi * np.minimum(phase / 0.75, 1))
    return arc**0.6 * voice(top * (0.75 + 0.25 * arc), (1000, 2800, 4000), 0.01, generator) + 0.003 * band_noise(generator, 50, 500)


SOUNDS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    sound.__name__: sound for sound in (rain, sea_waves, clock_tick, crackling_fire, helicopter, chainsaw, rooster, crying_baby)
}


def make_sound(name: str, *seed: int) -> np.ndarray:
    """(SAMPLES,), in [-1, 1]: one sound of a kind, at a random level, faded in and out. The same seed makes the same sound."""
    generator = np.random.default_rng((*seed, list(SOUNDS).index(name)))
    sound = SOUNDS[name](generator)
    fade = np.minimum(1, np.minimum(TIME, TIME[::-1]) / 0.02)
    return generator.uniform(0.3, 0.7) * fade * sound / np.abs(sound).max()


def make_scene() -> tuple[np.ndarray, list[Event]]:
    """The recording of SCENE, `(samples,)`, in [-1, 1], and what is when in it."""
    events = [Event(name, start, start + SECONDS) for name, start in SCENE]
    scene = np.zeros(round(max(event.offset for event in events) * SAMPLING_RATE))
    for i, event in enumerate(events):
        first = round(event.onset * SAMPLING_RATE)
        scene[first : first + SAMPLES] += make_sound(event.label, 1, i)
    return scene / max(1, np.abs(scene).max()), events


# --- the steps


def tag_sounds(model: SSLAMForAudioFrameClassification, extractor: SSLAMFeatureExtractor, folder: Path) -> None:
    """One made-up sound of each kind, written to `folder`; prints what it is and what the model takes the clip for."""
    folder.mkdir(parents=True, exist_ok=True)
    right = 0
    for name in SOUNDS:
        soundfile.write(folder / f"{name}.wav", make_sound(name, 0), SAMPLING_RATE)
        inputs = extractor(load_waveform(folder / f"{name}.wav"), sampling_rate=SAMPLING_RATE, return_tensors="pt")
        with torch.inference_mode():
            scores = model(**inputs).clip_logits[0].sigmoid()
        best = [(model.config.class_names[i], scores[i].item()) for i in scores.argsort(descending=True)[:3]]
        right += best[0][0] == name
        said = ", ".join(f"{label} {score:.2f}" for label, score in best)
        print(f"   {'right' if best[0][0] == name else 'wrong'}: made-up {name:<14} taken for {said}")
    print(
        f"   {right} of {len(SOUNDS)} right. The model learnt from real recordings, and these only imitate them: no measure of the model,"
    )
    print("   which its card has.")


def detect_events(
    model: SSLAMForAudioFrameClassification,
    extractor: SSLAMFeatureExtractor,
    waveform: np.ndarray,
    picture: Path,
    title: str,
    truth: Sequence[Event] = (),
) -> None:
    """Print which sounds are in a recording, from when to when, and write the picture."""
    scores = model.score_steps(waveform, extractor)
    events = find_events(scores.scores, scores.step, scores.classes, EventSettings.of(model.config), scores.duration)
    for event in events:
        print(f"   {event.start:6.2f} to {event.end:6.2f} s  {event.label:<15} {event.score:.2f}")
    if not events:
        print(f"   none of the {model.num_labels} kinds of sounds")
    picture.parent.mkdir(parents=True, exist_ok=True)
    plot_events(scores, events, waveform, picture, title, truth)
    print(f"   log-mel, events and their scores: {picture}")


def pre_train(checkpoint: Path, sounds: Path, output: Path) -> None:
    """Make sounds, stream them through `sslam pretrain`, and print how the losses fell."""
    for name in SOUNDS:
        (sounds / name).mkdir(parents=True, exist_ok=True)
        for clip in range(TRAINING_CLIPS):
            soundfile.write(sounds / name / f"{clip}.wav", make_sound(name, 2, clip), SAMPLING_RATE)
    shutil.rmtree(output, ignore_errors=True)  # of a demonstration before
    settings = [f"--data_dir={sounds}", f"--model={checkpoint}", f"--output_dir={output}"]
    command = [sys.executable, "-m", "transformers_sslam", "pretrain", "--config", "demo_pretrain", *settings]
    print(f"   {shlex.join(command)}", flush=True)
    # Transformers would list every tensor of the decoder and the teacher, which are not in the model and begin anew.
    subprocess.run(command, check=True, env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"})
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    print(f"   mean losses of the first {AVERAGED} updates, and of the last {AVERAGED}:")
    for name in ("loss", "local_loss", "global_loss", "source_retention_loss"):
        first, last = (np.mean([line[name] for line in part]) for part in (lines[:AVERAGED], lines[-AVERAGED:]))
        print(f"   {name:<22}{first:8.3f} -> {last:.3f}")


def print_what_next(checkpoint: Path, scene: Path) -> None:
    print(f"""
What to try next. The model lies in {checkpoint}; any mono waveform at 16 kHz will do:

import transformers_sslam
from transformers import AutoFeatureExtractor, AutoModelForAudioFrameClassification
from transformers_sslam.audio import load_waveform
model = AutoModelForAudioFrameClassification.from_pretrained("{checkpoint}")
print(model.detect(load_waveform("{scene}"), AutoFeatureExtractor.from_pretrained("{checkpoint}")))

Your own recording: make demo FILE=recording.wav. Training on your own sounds: docs/fine_tuning.md.""")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/demo"), help="for sounds, pictures and the pre-training")
    parser.add_argument("--file", type=Path, help="a recording of yours, in which sounds are detected, and nothing else")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of a SSLAM event detector, with its feature extractor")
    arguments = parser.parse_args()
    folder, file, checkpoint = arguments.folder, arguments.file, arguments.model
    transformers.logging.disable_progress_bar()
    if not (checkpoint / "config.json").is_file():
        sys.exit(f"error: there is no model in {checkpoint}: give the folder of a SSLAM event detector with --model")
    try:
        recording = None if file is None else load_waveform(file)  # first, so that nobody waits to learn of a broken file
    except AudioDecodingError as error:
        sys.exit(f"error: {error}")
    model, extractor = SSLAMForAudioFrameClassification.from_pretrained(checkpoint), SSLAMFeatureExtractor.from_pretrained(checkpoint)
    print(f"Model: {checkpoint}, {model.num_parameters():,} parameters, {model.num_labels} classes")

    if file is not None and recording is not None:
        print(f"\nSounds in {file}", flush=True)
        try:
            detect_events(model, extractor, recording, folder / "file_events.png", file.name)
        except ValueError as error:  # too short, or out of scale
            sys.exit(f"error: {file} cannot be used: {error}")
        return
    steps = itertools.count(1)
    print(f"\n{next(steps)}. Making up a sound of each of {len(SOUNDS)} kinds, and tagging it", flush=True)
    tag_sounds(model, extractor, folder / "sounds")
    print(f"\n{next(steps)}. Detecting events in a made-up recording in which sounds follow each other and overlap", flush=True)
    scene, events = make_scene()
    soundfile.write(folder / "scene.wav", scene, SAMPLING_RATE)
    detect_events(model, extractor, load_waveform(folder / "scene.wav"), folder / "events.png", "A made-up recording", events)
    print(f"\n{next(steps)}. Pre-training for half a minute on {TRAINING_CLIPS * len(SOUNDS)} made-up sounds, streamed", flush=True)
    pre_train(checkpoint, folder / "training_sounds", folder / "pretraining")
    print_what_next(checkpoint, folder / "scene.wav")


if __name__ == "__main__":
    main()
