"""The two processes of the server: the engine is kept alive and asked for pictures."""
