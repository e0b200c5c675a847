"""What `python -m benchmarks gpu` is made of: stages, the facts that they find, and verdicts."""
