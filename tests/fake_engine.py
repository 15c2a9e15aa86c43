"""An engine without a model. Spawned workers import this, so it imports little."""

import hashlib
from collections.abc import Sequence

import numpy as np

from pipeline.scoring.engines.base import Group, Numerics, Sharing

FAKE_NUMERICS = Numerics(
    engine="fake",
    engine_version="1.0",
    modeling_version="none",
    runner="hash",
    body_dtype="float32",
    head_dtype="float32",
    cache_dtype="none",
    attention_backend="none",
    quantisation="none",
    prefix_reuse="none",
    tensor_parallel=1,
    pipeline_parallel=1,
    batch_invariant=True,
    device_class="cpu",
    adapter_mode="none",
)
"""What `FakeEngine`'s numbers depend on."""


class FakeEngine:
    """Log-probs from a hash of the token ids: instant, and bit-equal in any batch."""

    def __init__(self, salt: str = "") -> None:
        self.salt = salt
        self.scored: list[str] = []
        self.sharing = Sharing(True)

    def score(self, groups: Sequence[Group], batch_tokens: int) -> list[list[np.ndarray]]:
        result = []
        for group in groups:
            rows = []
            for completion in group.completions:
                self.scored.append(completion.sequence_id)
                data = self.salt.encode() + group.prompt_ids.tobytes() + completion.ids.tobytes()
                seed = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
                values = -np.random.default_rng(seed).gamma(2.0, 1.0, len(completion.scored))
                rows.append(values.astype(np.float32))
            result.append(rows)
        return result

    def close(self) -> None:
        pass
