"""The benchmark suite: one definition of cases, peers and inputs for the commands, pytest-benchmark and the tests.

B batch, H heads, S padded length, D head_dim; times in milliseconds, memory in MiB (2**20 bytes).
"""

import os

# torch's profiler prints two lines per use, which would tear up the progress bar; read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
