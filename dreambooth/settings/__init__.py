"""The tables of options, and the code that reads their values."""
