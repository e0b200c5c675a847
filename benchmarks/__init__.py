"""What is measured by `python -m benchmarks NAME`: one module per name.

Each has `add_arguments(parser)` and `main(arguments) -> exit code`, prints a table, and as its last
line one JSON document.
"""
