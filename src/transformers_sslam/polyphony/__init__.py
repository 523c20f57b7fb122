"""Mixtures of single sounds with known events."""
