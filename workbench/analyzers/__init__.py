"""One module an analysis: a pure score function on tensors and a run that captures and calls it."""
