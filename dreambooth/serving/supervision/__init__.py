"""Keep the engine running in a process of its own, and request pictures from it."""
