"""What any process of ours needs: stop signals, logs, progress, files, the failure file."""
