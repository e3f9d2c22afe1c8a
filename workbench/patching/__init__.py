"""The patching engine: what every edge of a model contributes to a metric."""
