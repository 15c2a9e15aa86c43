"""The library: preference pairs to log-prob tables, policies and implicit rewards."""

import os

# On a CPU, torch's idle OpenMP threads spin for long before they sleep. Two such processes on the
# same cores then take each other's time: 153 tokens/s each instead of 282 with this, while one
# process alone is as fast (2 cores). Read when torch is loaded, so it must be set before.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
