"""Serving: requests in, pictures out; a server process without torch and an engine process."""
