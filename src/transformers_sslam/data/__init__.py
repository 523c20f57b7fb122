"""Audio in: from files of any kind to mono waveforms at the model's rate."""
