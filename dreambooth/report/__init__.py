"""Makes the report of a training run: report.html, self-contained and without scripts."""
