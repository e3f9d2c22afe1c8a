"""Tests of the kernels in Triton's interpreter.

Triton decides when it is imported whether kernels are interpreted. So these tests are collected only in a process that
was started with TRITON_INTERPRET=1: `test_interpreted.py` starts one for each file here.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
