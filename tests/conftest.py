"""One thread a test: bit for bit needs one order of summation, and on a busy machine threads wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for this process, torch not being imported yet, and those it starts
