"""Encoders as the suites of public benchmarks take them: mteb, X-ARES and HEAR."""
