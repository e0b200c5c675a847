"""The page that a training run leaves behind: report.html, self-contained and without scripts."""
