"""Decode many damaged sound files, and report those that come out wrong without an error.

    python scripts/fuzz_decoding.py --files 3000 --seed 0

Short sounds are encoded in eight formats and mutated. Each file is decoded whole and in blocks by a worker process. "right" files have
the length of the original within 0.1 s, "counted" ones raised an `AudioDecodingError`; any other outcome is a fault, and the exit status
is then 1. Faulty files are kept in the folder given by `--keep`.
"""

import argparse
import io
import multiprocessing
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import av
import numpy as np
import soundfile

from transformers_sslam.audio import AudioDecodingError, load_waveform, read_blocks


LIMIT = 10  # seconds for one file
MEMORY = 8 << 30  # bytes of address space for a worker
TOLERANCE = 0.1  # seconds
RATE = 16_000  # Hz, of what is decoded
FAULTS = ("shorter", "longer", "blocks differ", "crash", "hang")
SOUNDFILE = {"WAV": "PCM_16", "FLAC": "PCM_16", "AIFF": "PCM_16", "Vorbis": "VORBIS"}
PYAV = {"MP3": ("libmp3lame", "mp3"), "Opus": ("libopus", "ogg"), "AAC": ("aac", "mp4"), "WebM": ("libopus", "webm")}
RATES = {"Opus": (48_000,), "WebM": (48_000,), "MP3": (16_000, 22_050, 44_100, 48_000)}


def encoded(kind: str, seconds: float, rate: int, channels: int, generator: np.random.Generator) -> bytes:
    """A file of one format that holds a tone in noise."""
    time = np.arange(round(seconds * rate)) / rate
    tone = 0.3 * np.sin(2 * np.pi * generator.uniform(200, 2000) * time)
    samples = (tone[:, None] + 0.05 * generator.standard_normal((len(time), channels))).astype(np.float32)
    file = io.BytesIO()
    if kind in SOUNDFILE:
        soundfile.write(file, samples, rate, format="OGG" if kind == "Vorbis" else kind, subtype=SOUNDFILE[kind])
        return file.getvalue()
    codec, container_format = PYAV[kind]
    options = {"movflags": "frag_keyframe+empty_moov+delay_moov"} if kind == "AAC" and generator.random() < 0.3 else {}
    with av.open(file, "w", format=container_format, options=options) as container:
        stream: Any = container.add_stream(codec, rate=rate, layout="mono" if channels == 1 else "stereo")
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), "flt", "mono" if channels == 1 else "stereo")
        frame.sample_rate, frame.pts = rate, 0
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return file.getvalue()


def mutated(data: bytes, generator: np.random.Generator) -> tuple[str, bytes]:
    """What was done, and its result. Half of the places lie in the first or the last 512 bytes, where most headers and indices are."""
    result, size = bytearray(data), len(data)

    def place() -> int:
        where = generator.random()
        first, last = (0, 512) if where < 0.35 else (size - 512, size) if where < 0.5 else (0, size)
        return int(generator.integers(max(0, first), min(size, last)))

    at, length = place(), int(2 ** generator.uniform(0, np.log2(size / 2)))
    action = str(generator.choice(["flip bits", "overwrite", "cut", "delete", "duplicate", "zero", "insert"]))
    if action == "flip bits":
        for _ in range(generator.integers(1, 9)):
            result[place()] ^= 1 << int(generator.integers(8))
    elif action == "overwrite":
        values = generator.integers(0, 256, int(generator.integers(1, 9)), dtype=np.uint8).tobytes()
        result[at : at + len(values)] = values[: size - at]
    elif action == "cut":
        del result[at:]
    elif action == "delete":
        del result[at : at + length]
    elif action == "duplicate":
        result[at:at] = result[at : at + length]
    elif action == "zero":
        result[at : at + length] = bytes(min(length, size - at))
    else:
        result[at:at] = generator.integers(0, 256, length, dtype=np.uint8).tobytes()
    return action, bytes(result)


def undetectable(kind: str, original: bytes, damaged: bytes, length: float, duration: float, rate: int) -> bool:
    """Whether the result, of which `length` seconds were decoded instead of `duration`, is a valid file of that length by the definition of
    the format.

    AIFF: nothing in the file repeats the ten bytes of the sampling rate. AAC in fragments of MP4: nothing but the edit list tells that the
    encoder added 1,024 samples at the start, and nothing how many at the end. MP3: nothing but the Xing header tells how many frames there
    are; a file without it may begin and end with any frame. But all the frames that are still whole must come out, and no others than
    these, those that were damaged, and that of the header.
    """
    if kind == "AIFF":
        at = original.index(b"COMM") + 16
        return original[at : at + 10] != damaged[at : at + 10]
    if kind == "AAC" and b"moof" in original:
        return 0 < length - duration <= 2048 / rate
    if kind != "MP3" or b"Xing" in damaged or b"Info" in damaged:
        return False
    with av.open(io.BytesIO(original), "r") as container:
        copies = [damaged.count(bytes(packet)) for packet in container.demux(audio=0) if packet.size]
    seconds = (1152 if rate >= 32_000 else 576) / rate  # of a frame of MPEG-1, or of MPEG-2 and 2.5
    return sum(copies) * seconds - TOLERANCE <= length <= (sum(max(1, count) for count in copies) + 1) * seconds + TOLERANCE


def decode(data: bytes) -> tuple[str, Any]:
    """What came out: ("length", whole, blocks) in seconds, ("counted", cause) or ("crash", exception)."""
    outcomes: list[Any] = []
    for read in (load_waveform, lambda data: np.concatenate(list(read_blocks(data, RATE, 0.7)))):
        try:
            outcomes.append(read(data))
        except AudioDecodingError as error:
            outcomes.append(error.cause)
        except Exception as error:
            return "crash", repr(error)
    whole, blocks = outcomes
    if isinstance(whole, str) and whole == blocks:
        return "counted", whole
    if isinstance(whole, str) or isinstance(blocks, str) or whole.shape != blocks.shape or np.abs(whole - blocks).max() > 1e-3:
        return "blocks differ", [outcome if isinstance(outcome, str) else len(outcome) for outcome in outcomes]
    return "length", len(whole) / RATE


def serve(connection) -> None:
    import resource

    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with suppress(EOFError):  # the main process has ended
        while True:
            connection.send(decode(connection.recv()))


class Worker:
    """A process that decodes one file at a time and is started again where it dies or hangs."""

    def __init__(self) -> None:
        self.connection, other = multiprocessing.get_context("spawn").Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=serve, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.run(encoded("WAV", 0.5, 44_100, 1, np.random.default_rng(0)), limit=120)  # imports what it needs

    def run(self, data: bytes, limit: float = LIMIT) -> tuple[str, Any]:
        try:
            self.connection.send(data)
            outcome = self.connection.recv() if self.connection.poll(limit) else ("hang", f"over {limit} s")
        except (EOFError, OSError):
            outcome = ("crash", "the process died")
        if outcome[0] == "hang" or not self.process.is_alive():
            self.process.kill()
            self.__init__()  # type: ignore[misc]
        return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--files", type=int, default=3000, help="number of mutated files")
    parser.add_argument("--seed", type=int, default=0, help="random seed of sounds and mutations")
    parser.add_argument("--processes", type=int, default=2, help="number of worker processes")
    parser.add_argument("--formats", nargs="+", default=[*SOUNDFILE, *PYAV], help="formats to try")
    parser.add_argument("--keep", type=Path, help="folder for the files that come out wrong")
    arguments = parser.parse_args()
    workers: SimpleQueue[Worker] = SimpleQueue()
    for _ in range(arguments.processes):
        workers.put(Worker())

    def attempt(number: int) -> tuple[str, str]:
        generator = np.random.default_rng((arguments.seed, number))
        kind = arguments.formats[number % len(arguments.formats)]
        seconds, channels = generator.uniform(1, 3), int(generator.integers(1, 3))
        rate = int(generator.choice(RATES.get(kind, (8000, 16_000, 22_050, 44_100, 48_000))))
        original = encoded(kind, seconds, rate, channels, generator)
        action, damaged = mutated(original, generator)
        worker = workers.get()
        outcome, detail = worker.run(damaged)
        workers.put(worker)
        if outcome == "length":
            difference = detail - seconds
            outcome = "right" if abs(difference) <= TOLERANCE else "longer" if difference > 0 else "shorter"
        if outcome in ("longer", "shorter") and undetectable(kind, original, damaged, detail, seconds, rate):
            outcome = "undetectable"
        if outcome in FAULTS:
            print(f"{number}: {kind}, {seconds:.2f} s, {rate} Hz, {channels} channels, {action}: {outcome} ({detail})", file=sys.stderr)
            if arguments.keep:
                arguments.keep.mkdir(parents=True, exist_ok=True)
                (arguments.keep / f"{number}.damaged").write_bytes(damaged)
                (arguments.keep / f"{number}.original").write_bytes(original)
        return kind, detail if outcome == "counted" else outcome

    with ThreadPoolExecutor(arguments.processes + 1) as pool:
        counts = Counter(pool.map(attempt, range(arguments.files)))
    columns = sorted({outcome for _, outcome in counts} - {"right", *FAULTS})
    columns = ["right", *columns, *FAULTS]
    print(f"{'':8}" + "".join(f"{column:>14}" for column in columns))
    for kind in arguments.formats:
        print(f"{kind:8}" + "".join(f"{counts[kind, column]:14}" for column in columns))
    faults = sum(count for (_, outcome), count in counts.items() if outcome in FAULTS)
    print(f"{arguments.files} files, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
