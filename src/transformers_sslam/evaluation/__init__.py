"""How good a model is, and how sure that is: metrics, confidence intervals, probes, tables of results."""
