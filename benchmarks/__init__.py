"""The benchmarks that `python -m benchmarks NAME` runs, one module per name.

Each module has `add_arguments(parser)` and `main(arguments) -> exit code`. It prints a table and,
as its last line, one JSON document.
"""
