"""Models in and out: official checkpoints, ONNX, model cards, the Hub."""
