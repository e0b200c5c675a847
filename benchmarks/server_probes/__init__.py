"""What `benchmark probes` does to a running server: one module per probe, each with one job."""
