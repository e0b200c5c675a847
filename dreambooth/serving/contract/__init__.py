"""Read the bytes of requests, and write those of replies."""
