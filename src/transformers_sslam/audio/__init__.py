"""Audio in: the only package that opens a data set or decodes a file."""

from ..errors import AudioDecodingError
from .decode import AUDIO_SUFFIXES, load_waveform, read_blocks


__all__ = ["AUDIO_SUFFIXES", "AudioDecodingError", "load_waveform", "read_blocks"]
