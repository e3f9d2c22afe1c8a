"""Loading a model and looking at it head by head."""
