"""Command-line verbs of the circuits package."""
