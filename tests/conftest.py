"""What holds for all tests: none reaches the network, and none leaves anything on the disk."""

import os
from tempfile import TemporaryDirectory

# What is not on this machine must fail at once, not after retries.
os.environ["HF_HUB_OFFLINE"] = "1"

# nbval kills its kernels, which cannot tidy up then: what they leave goes with this process.
LEFTOVERS = TemporaryDirectory(prefix="lab-tests-")
os.environ["TMPDIR"] = LEFTOVERS.name
