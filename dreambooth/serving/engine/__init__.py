"""The engine draws the requested pictures step by step in one thread."""
