"""What every test needs set before torch and transformers are imported."""

import atexit
import os
import tempfile

from hypothesis import settings

from prime_v2.commands.process import bound_spinning

# One thread a process: the networks of the tests are too small to share, and a second thread on a busy machine makes
# them several times slower.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
bound_spinning()  # for the processes that tests start with more threads

# No network. A cache of its own for each process: nothing is read from or left in the user's, and no two processes
# write one copied model file at the same time.
HF_HOME = tempfile.TemporaryDirectory(prefix="prime_v2_hf_home_")
atexit.register(HF_HOME.cleanup)
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": HF_HOME.name}

# `filterwarnings = error` of setup.cfg holds in this process; deprecated calls are errors in those that tests start.
os.environ["PYTHONWARNINGS"] = "error::DeprecationWarning,error::PendingDeprecationWarning,error::FutureWarning"

# The same examples in every run; no deadline, since the first call of an operator in torch is a slow one.
settings.register_profile("prime_v2", derandomize=True, deadline=None)
# As many more of tests/*/test_fuzz_*.py as fuzzing.py says: --hypothesis-profile=thorough, or benchmarks/fuzz.py.
settings.register_profile("thorough", settings.get_profile("prime_v2"), print_blob=True)
settings.load_profile("prime_v2")
