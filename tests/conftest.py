"""One thread a test: torch's threads spin while they wait, and on a busy machine that costs more than they bring."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start; before torch is imported here
