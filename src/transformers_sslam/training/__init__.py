"""Training programs: settings, augmentation, fine-tuning."""
