"""Run one training job: plain command line, SageMaker script mode, or a SageMaker container.

`python transfer_learning.py --help` lists every setting; `--dry-run` prints the training plan and
stops.
"""

from __future__ import annotations

import os
import sys

from dreambooth.job.run import run_job

if __name__ == "__main__":
    sys.exit(run_job(sys.argv[1:], os.environ, is_process=True))
