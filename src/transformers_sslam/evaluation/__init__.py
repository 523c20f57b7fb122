"""How good a model is: metrics."""
