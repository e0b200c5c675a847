"""Serve pictures with two processes, an HTTP server without torch and an engine that draws."""
