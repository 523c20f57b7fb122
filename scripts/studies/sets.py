"""Sets of speech and music that anyone can make again, from packages of Debian: folders of audio with labels and folds.

apt-get install asterisk-core-sounds-{en,es,fr,it,ru}-gsm asterisk-prompt-{es-co,fr-armelle,it-menardi-gsm}
python scripts/studies/sets.py --kind speakers --output_dir runs/speakers
apt-get install libfluidsynth3 fluid-soundfont-gm && pip install pyfluidsynth
python scripts/studies/sets.py --kind instruments --output_dir runs/instruments
apt-get install asterisk-core-sounds-ru-g722 espeak-ng flite
python scripts/studies/sets.py --kind speech --output_dir runs/speech
apt-get install libfluidsynth3 musescore-general-soundfont-lossless && pip install pyfluidsynth
python scripts/studies/sets.py --kind tunes --output_dir runs/tunes --soundfont /usr/share/sounds/sf2/MuseScore_General_Full.sf2

Speakers: prompts of telephone exchanges (digits, letters, words, short sentences), seven voices in five languages, all of 8 kHz and coded
alike (GSM). A prompt is in the same fold for all of them. Licences: CC-BY(-SA) 3.0, GPL-2 (es-co) and BSD (fr-armelle), as the copyright
files of the packages say.

Instruments: notes of 3 s of twenty of them, every third semitone of five octaves, rendered by FluidSynth from FluidR3 (MIT licence). A
fold has every fifth of these pitches, the same for all instruments: 15 semitones apart, so that no fold has octaves alone.

Speech and tunes are for a model that shall not take them for something else, under licences that let anyone use its weights. Speech: clips
of 5 s, numbers that espeak-ng reads in sixteen languages and flite in four voices, each language and each of these voices in one fold; and,
in all folds, prompts of a person (CC-BY 3.0), at 16 kHz (G.722). Tunes: 5 s of a melody and chords at random, of instruments that are in
one fold each, half of them with drums, which are in all, rendered by FluidSynth; the soundfont is under the MIT licence, parts under CC0.
"""

import csv
import hashlib
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import soundfile

from transformers_sslam.errors import UserError
from transformers_sslam.files import check_free, write_folder_atomically
from transformers_sslam.settings import parse_settings, setting


# Folders of a voice. One person recorded two languages.
VOICES = {
    "allison": ("en_US_f_Allison", "es_MX_f_Allison"),
    "armelle": ("fr",),
    "carlo": ("it_IT_m_Carlo",),
    "ivrvoice": ("ru_RU_f_IvrvoiceRU",),
    "july": ("es",),
    "june": ("fr_CA_f_June",),
    "paola": ("it_IT_f_Menardi",),
}
NOT_SPEECH = ("beep", "silence", "tt-", "ascending", "descending", "hello-world-")  # how the names of sounds without a voice begin
VOICE_RATE, SECONDS = 8_000, (0.3, 5.0)
VOICE_FOLDS = 5

# By their numbers in General MIDI, level 1, counted from 0.
INSTRUMENTS = {
    **{0: "piano", 6: "harpsichord", 11: "vibraphone", 12: "marimba", 16: "drawbar_organ", 19: "church_organ", 21: "accordion"},
    **{24: "nylon_guitar", 30: "distortion_guitar", 32: "acoustic_bass", 40: "violin", 42: "cello", 46: "harp", 52: "choir"},
    **{56: "trumpet", 57: "trombone", 60: "french_horn", 65: "alto_saxophone", 71: "clarinet", 73: "flute"},
}
PITCHES = range(36, 97, 3)
NOTE_RATE, NOTE_SECONDS, RELEASE_SECONDS, VELOCITY = 16_000, 3.0, 1.0, 100
AUDIBLE = 1e-3  # peak below which an instrument has no such note
NOTE_FOLDS = 5

OTHER_FOLDS, OTHER_SECONDS, OTHER_RATE = 4, 5.0, 16_000  # of speech and tunes
LANGUAGES = (  # of espeak-ng, which reads numbers in each
    *("cs", "de", "el", "en-gb-scotland", "en-us", "es", "fi", "fr-fr"),
    *("hi", "it", "nl", "pl", "pt-br", "ru", "sv", "tr"),
)
VARIANTS = ("m1", "m3", "m5", "m7", "f1", "f2", "f3", "f4")  # men and women of espeak-ng
FLITE_VOICES = ("awb", "kal16", "rms", "slt")
PERSON = "ru_RU_f_IvrvoiceRU"
CLIPS_OF_A_LANGUAGE, CLIPS_OF_A_VOICE, CLIPS_OF_THE_PERSON = 3, 6, 40
TUNES = 96
TUNE_PROGRAMS = tuple(program for program in range(112) if program != 14)  # no percussion, no noises, no tubular bells
SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10))  # major and natural minor, in semitones
DRUMS = {0: 36, 4: 38}  # by eighths of a bar: bass drum and snare of General MIDI's channel 10; on all others a closed hi-hat
CLOSED_HI_HAT, DRUM_CHANNEL = 42, 9


@dataclass
class SetSettings:
    kind: Literal["speakers", "instruments", "speech", "tunes"] = setting("which set to make")
    output_dir: str = setting("folder for the clips and their metadata.csv, new or empty")
    sounds_dir: str = setting("where the packages put the prompts", "/usr/share/asterisk/sounds")
    soundfont: str = setting("where the package put the instruments", "/usr/share/sounds/sf2/FluidR3_GM.sf2")


@dataclass(frozen=True)
class Clip:
    """A clip of a set: `waveform: (samples,)`, and its row of `metadata.csv`."""

    name: str
    waveform: np.ndarray
    sampling_rate: int
    label: str
    recording: str
    fold: int


def speakers(sounds_dir: str | Path) -> Iterator[Clip]:
    """All prompts of 0.3 to 5 s that are speech. One that a voice has under two names comes once.

    Raises:
        UserError: if a voice has none.
    """
    seen: set[bytes] = set()
    for voice, folders in VOICES.items():
        count = 0
        for folder in folders:
            root = Path(sounds_dir) / folder
            for file in sorted(root.rglob("*.gsm")):
                prompt = file.relative_to(root).with_suffix("").as_posix()
                content = hashlib.sha256(file.read_bytes()).digest()
                if content in seen or any(part.startswith(NOT_SPEECH) for part in prompt.split("/")):
                    continue
                seen.add(content)
                waveform, _ = soundfile.read(file, format="RAW", subtype="GSM610", samplerate=VOICE_RATE, channels=1, dtype="float32")
                if SECONDS[0] <= len(waveform) / VOICE_RATE <= SECONDS[1]:
                    count += 1
                    name = f"{folder}-{prompt.replace('/', '-')}"
                    yield Clip(name, waveform, VOICE_RATE, voice, prompt, zlib.crc32(prompt.encode()) % VOICE_FOLDS + 1)
        if not count:
            raise UserError(f"{sounds_dir} has no prompts of {voice} in {', '.join(folders)}: install the packages that this script names")


def instruments(synthesizer: Any, soundfont: str | Path) -> Iterator[Clip]:
    """Every note that an instrument has.

    Args:
        synthesizer: as `fluidsynth.Synth`, at 16 kHz.
        soundfont: file with the programs of General MIDI.

    Raises:
        UserError: if the file cannot be read, or lacks an instrument.
    """
    loaded = synthesizer.sfload(str(soundfont))
    if loaded < 0:
        raise UserError(f"{soundfont} is not a readable soundfont: install fluid-soundfont-gm, or give another one as soundfont")
    for program, instrument in INSTRUMENTS.items():
        count = 0
        for number, pitch in enumerate(PITCHES):
            synthesizer.system_reset()  # or what is left of the last note would sound in this one
            if synthesizer.program_select(0, loaded, 0, program) != 0:
                raise UserError(f"{soundfont} has no program {program} ({instrument}): give a soundfont of General MIDI")
            synthesizer.noteon(0, pitch, VELOCITY)
            held = synthesizer.get_samples(round(NOTE_SECONDS * NOTE_RATE))
            synthesizer.noteoff(0, pitch)
            stereo = np.concatenate((held, synthesizer.get_samples(round(RELEASE_SECONDS * NOTE_RATE))))
            waveform = stereo.reshape(-1, 2).mean(1).astype(np.float32) / 2**15
            if np.abs(waveform).max() >= AUDIBLE:
                count += 1
                name = f"{instrument}-{pitch:03d}"
                yield Clip(name, waveform, NOTE_RATE, instrument, name, number % NOTE_FOLDS + 1)
        if not count:
            raise UserError(f"{soundfont} has no note of {instrument} that sounds: give a soundfont of General MIDI")


def speech(sounds_dir: str | Path) -> Iterator[Clip]:
    """Clips of up to 5 s, of synthetic voices and of a person.

    Raises:
        UserError: if the person has no prompts, or a program is not installed or fails.
    """
    if missing := sorted(set(FLITE_VOICES) - installed_voices()):  # flite would speak in another voice
        raise UserError(f"flite has no voice {missing[0]}: install the package flite of Debian 12 or later")
    voices = [*((language, CLIPS_OF_A_LANGUAGE) for language in LANGUAGES), *((voice, CLIPS_OF_A_VOICE) for voice in FLITE_VOICES)]
    for position, (voice, count) in enumerate(voices):
        generator = np.random.default_rng(zlib.crc32(voice.encode()))
        for number in range(count):
            text = ", ".join(str(generator.integers(10 ** generator.integers(1, 6))) for _ in range(4))
            if voice in FLITE_VOICES:
                command = ["flite", "-voice", voice, "--setf", f"duration_stretch={generator.uniform(0.8, 1.2):.2f}", "-t", text, "-o"]
            else:
                options = ["-p", str(generator.integers(30, 71)), "-s", str(generator.integers(120, 191))]
                command = ["espeak-ng", "-v", f"{voice}+{generator.choice(VARIANTS)}", *options, text, "-w"]
            waveform, rate = speak(command)
            yield Clip(f"{voice}-{number}", waveform[: round(OTHER_SECONDS * rate)], rate, "speech", voice, position % OTHER_FOLDS + 1)
    for number, waveform in enumerate(_prompts_in_a_row(Path(sounds_dir) / PERSON)):
        yield Clip(f"person-{number:02d}", waveform, OTHER_RATE, "speech", f"person-{number:02d}", number % OTHER_FOLDS + 1)


def installed_voices() -> set[str]:
    """Those of flite."""
    try:
        return set(subprocess.run(["flite", "-lv"], check=True, capture_output=True, text=True).stdout.partition(":")[2].split())
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"flite does not start ({error}): install the packages that this script names") from error


def speak(command: list[str]) -> tuple[np.ndarray, int]:
    """What a program says, which writes a file that is its last argument: `(samples,)` and their rate."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "speech.wav"
        try:
            subprocess.run([*command, str(file)], check=True, capture_output=True)
            waveform, rate = soundfile.read(file, dtype="float32")
        except (OSError, subprocess.CalledProcessError, soundfile.LibsndfileError) as error:
            raise UserError(f"{command[0]} cannot speak ({error}): install the packages that this script names") from error
    return waveform, rate


def _prompts_in_a_row(folder: Path) -> Iterator[np.ndarray]:
    """Clips of 5 s, each of other prompts, with pauses of .1 to .5 s."""
    files = sorted(file for file in folder.rglob("*.g722") if not file.relative_to(folder).as_posix().startswith(NOT_SPEECH))
    if not files:
        raise UserError(f"{folder} has no prompts: install asterisk-core-sounds-ru-g722, or give another sounds_dir")
    generator, length = np.random.default_rng(0), round(OTHER_SECONDS * OTHER_RATE)
    remaining = iter(generator.permutation(len(files)))
    for _ in range(CLIPS_OF_THE_PERSON):
        parts: list[np.ndarray] = []
        while sum(map(len, parts)) < length:
            if (index := next(remaining, None)) is None:
                return
            with av.open(str(files[index]), format="g722") as container:
                decoded = [frame.to_ndarray().ravel() for frame in container.decode(audio=0)]
            pause = np.zeros(round(generator.uniform(0.1, 0.5) * OTHER_RATE), np.float32)
            parts += [np.concatenate(decoded).astype(np.float32) / 2**15, pause]
        yield np.concatenate(parts)[:length]


def tunes(synthesizer: Any, soundfont: str | Path) -> Iterator[Clip]:
    """Random tunes of 5 s. Arguments and errors as of `instruments`."""
    loaded = synthesizer.sfload(str(soundfont))
    if loaded < 0:
        raise UserError(f"{soundfont} is not a readable soundfont: install musescore-general-soundfont-lossless, or give another one")
    for number in range(TUNES):
        generator, fold = np.random.default_rng(number), number % OTHER_FOLDS + 1
        synthesizer.system_reset()
        programs = generator.choice(TUNE_PROGRAMS[fold - 1 :: OTHER_FOLDS], 2, replace=False)
        for channel, program in enumerate(programs):
            if synthesizer.program_select(channel, loaded, 0, int(program)) != 0:
                raise UserError(f"{soundfont} has no program {program}: give a soundfont of General MIDI")
        if synthesizer.program_select(DRUM_CHANNEL, loaded, 128, 0) != 0:
            raise UserError(f"{soundfont} has no drums: give a soundfont of General MIDI")
        eighth, now, played = 30 / generator.uniform(70, 160), 0, []
        for instant, channel, pitch, velocity in sorted(compose(generator, eighth)):
            sample = round(instant * OTHER_RATE)
            if sample > now:
                played.append(synthesizer.get_samples(sample - now))
                now = sample
            if velocity:
                synthesizer.noteon(channel, pitch, velocity)
            else:
                synthesizer.noteoff(channel, pitch)
        played.append(synthesizer.get_samples(round(OTHER_SECONDS * OTHER_RATE) - now))
        waveform = np.concatenate(played).reshape(-1, 2).mean(1).astype(np.float32) / 2**15
        yield Clip(f"tune-{number:02d}", waveform, OTHER_RATE, "music", f"tune-{number:02d}", fold)


def compose(generator: np.random.Generator, eighth: float) -> list[tuple[float, int, int, int]]:
    """What is played when: seconds, channel, pitch and velocity, which is 0 where a note ends. The melody is a random walk in a scale, in
    notes of one to three eighths; each bar has a chord."""
    scale, root = SCALES[generator.integers(2)], int(generator.integers(43, 55))
    played: list[tuple[float, int, int, int]] = []

    def play(channel: int, pitch: int, start: int, eighths: int, velocity: int) -> None:
        onset, offset = start * eighth, (start + 0.95 * eighths) * eighth
        if onset < OTHER_SECONDS:
            played.extend([(onset, channel, pitch, velocity), (min(offset, OTHER_SECONDS), channel, pitch, 0)])

    def degree(number: int) -> int:
        return root + 12 * (number // 7) + scale[number % 7]

    count, start, step = int(OTHER_SECONDS / eighth) + 1, 0, int(generator.integers(7, 15))
    while start < count:
        length = int(generator.integers(1, 4))
        if generator.random() < 0.9:  # else a rest
            play(0, degree(step), start, length, int(generator.integers(70, 120)))
        step, start = int(np.clip(step + generator.integers(-2, 3), 4, 18)), start + length
    for start in range(0, count, 8):
        first = int(generator.integers(7))
        for third in (0, 2, 4):
            play(1, degree(first + third), start, 8, int(generator.integers(50, 90)))
    if generator.random() < 0.5:
        for start in range(count):
            play(DRUM_CHANNEL, DRUMS.get(start % 8, CLOSED_HI_HAT), start, 1, int(generator.integers(60, 110)))
    return played


def write_set(clips: Iterable[Clip], output_dir: str | Path) -> int:
    """FLAC files of 16 bits and `metadata.csv`, whole or not at all. Returns the number of clips."""
    target = check_free(output_dir)
    rows = []
    with write_folder_atomically(target) as unfinished:
        for clip in clips:
            soundfile.write(unfinished / f"{clip.name}.flac", clip.waveform, clip.sampling_rate, subtype="PCM_16")
            rows.append([f"{clip.name}.flac", clip.label, clip.recording, clip.fold])
        with (unfinished / "metadata.csv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows([["file_name", "label", "recording", "fold"], *rows])
    return len(rows)


def open_synthesizer() -> Any:
    """FluidSynth, without reverberation and chorus, which would add what is not of the instrument."""
    try:
        import fluidsynth
    except ImportError as error:
        raise UserError("instruments need FluidSynth: apt-get install libfluidsynth3, and pip install pyfluidsynth") from error
    return fluidsynth.Synth(gain=1.0, samplerate=float(NOTE_RATE), **{"synth.reverb.active": 0, "synth.chorus.active": 0})


def main() -> None:
    try:
        settings = parse_settings(SetSettings, sys.argv[1:], prog="sets.py", description=__doc__)
        if settings.kind in ("speakers", "speech"):
            clips = {"speakers": speakers, "speech": speech}[settings.kind](settings.sounds_dir)
        else:
            clips = {"instruments": instruments, "tunes": tunes}[settings.kind](open_synthesizer(), settings.soundfont)
        print(f"{write_set(clips, settings.output_dir)} clips in {settings.output_dir}")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
