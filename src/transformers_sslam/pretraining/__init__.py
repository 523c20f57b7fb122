"""Pre-training: settings, loop, checkpoints, log."""
