"""The parts of `python -m benchmarks probes`: a module per probe, and what the probes share."""
