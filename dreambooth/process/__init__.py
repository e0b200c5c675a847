"""Tools that every process needs: stop signals, logs, progress, files and the failure file."""
