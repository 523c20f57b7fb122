"""How fast it is, as ratios of interleaved runs: steps of pre-training, encoding, log-mels, the input path."""
