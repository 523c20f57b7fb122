"""Sets of speakers and of musical instruments that anyone can make again, from packages of Debian: folders of audio with labels and folds.

apt-get install asterisk-core-sounds-{en,es,fr,it,ru}-gsm asterisk-prompt-{es-co,fr-armelle,it-menardi-gsm}
python scripts/studies/sets.py --kind speakers --output_dir runs/speakers
apt-get install libfluidsynth3 fluid-soundfont-gm && pip install pyfluidsynth
python scripts/studies/sets.py --kind instruments --output_dir runs/instruments

Speakers: prompts of telephone exchanges (digits, letters, words, short sentences), seven voices in five languages, all of 8 kHz and coded
alike (GSM). A prompt is in the same fold for all of them. Licences: CC-BY(-SA) 3.0, GPL-2 (es-co) and BSD (fr-armelle), as the copyright
files of the packages say.

Instruments: notes of 3 s of twenty of them, every third semitone of five octaves, rendered by FluidSynth from FluidR3 (MIT licence). A
fold has every fifth of these pitches, the same for all instruments: 15 semitones apart, so that no fold has octaves alone.
"""

import csv
import hashlib
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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


@dataclass
class SetSettings:
    kind: Literal["speakers", "instruments"] = setting("which set to make")
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
        clips = speakers(settings.sounds_dir) if settings.kind == "speakers" else instruments(open_synthesizer(), settings.soundfont)
        print(f"{write_set(clips, settings.output_dir)} clips in {settings.output_dir}")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
