"""Training: the pre-training loop, fine-tuning, their settings, and the steps of studies."""
