"""The parts of `python -m benchmarks train`; `levers` states what the fast step should gain."""
