"""Inference on recordings in bulk: labels of files of any length, and plots of them."""
