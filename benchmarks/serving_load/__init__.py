"""The parts of `python -m benchmarks serving`: traffic, policies, measurements and a simulation."""
