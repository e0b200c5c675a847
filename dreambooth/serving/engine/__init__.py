"""The engine: one thread that draws what is asked for, step by step."""
