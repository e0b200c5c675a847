"""What `benchmark serving` is made of: traffic, ways to serve it, measuring and simulating."""
