"""The forward pass that scoring and training share, so that step 0 can be exactly 0."""

from pipeline.scoring.engines.forward.attention import recomputing
from pipeline.scoring.engines.forward.model import Forward, Within

__all__ = ["Forward", "Within", "recomputing"]
