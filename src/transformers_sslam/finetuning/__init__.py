"""Fine-tuning of classifiers on labelled clips."""
