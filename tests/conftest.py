"""Tests reach no network: what is not on this machine must fail at once, not after retries."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
