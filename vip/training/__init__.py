"""Training and evaluation: configuration, weights, precision, the engine and the run."""
