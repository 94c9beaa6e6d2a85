"""Where randomness comes from: keys for the noise of each step, and generators for its draw."""

import hashlib
import json
import secrets

import numpy as np

__all__ = ["RandomSource", "SharedSource"]


class RandomSource:
    """Keys for the noise of each step and generators for its draw.

    Without a seed each request reads fresh operating-system entropy, so nothing can repeat,
    whatever is copied, restarted or restored. With a seed (for tests: who knows it can subtract
    the noise) a request is a function of the seed and its position, and positions never recur
    within a model or a ledger.

    Args:
        seed: None, or a non-negative integer.

    Raises:
        ValueError: anything else.

    >>> RandomSource(7).key(0).tolist() == RandomSource(7).key(0).tolist()
    True
    >>> RandomSource(None).key(0).tolist() == RandomSource(None).key(0).tolist()
    False
    """

    def __init__(self, seed: int | None = None) -> None:
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
            raise ValueError(f"`seed` must be None or a non-negative integer; got {seed!r}.")
        self.seed = seed

    def _sequence(self, *position):
        if self.seed is None:
            return np.random.SeedSequence(secrets.randbits(256))
        return np.random.SeedSequence(self.seed, spawn_key=position)

    def key(self, *position: int) -> np.ndarray:
        """128 bits, as uint32 of shape (4,), for the noise of one step."""
        if self.seed is None:
            return np.frombuffer(secrets.token_bytes(16), dtype=np.uint32)
        return self._sequence(0, *position).generate_state(4, np.uint32)

    def generator(self, *position: int) -> np.random.Generator:
        """NumPy generator for a draw of examples."""
        return np.random.Generator(np.random.Philox(self._sequence(1, *position)))


class SharedSource(RandomSource):
    """Randomness that all processes of a run share: a function of the chief's fresh secret.

    Keys and the seeds of draws are keyed BLAKE2b hashes of their position, so that who learns some
    of them learns nothing of the others, nor of the secret.

    Args:
        secret: 32 bytes from the operating system of the chief, used for one run only.

    >>> source = SharedSource(bytes(32))
    >>> source.key(1, 2).tolist() == SharedSource(bytes(32)).key(1, 2).tolist()
    True
    >>> source.key(1, 2).tolist() == source.key(1, 3).tolist()
    False
    """

    def __init__(self, secret: bytes) -> None:
        super().__init__(None)
        self._secret = secret

    def _bytes(self, position, size):
        text = json.dumps([int(p) for p in position]).encode()
        return hashlib.blake2b(text, key=self._secret, digest_size=size).digest()

    def _sequence(self, *position):
        return np.random.SeedSequence(int.from_bytes(self._bytes(position, 32), "little"))

    def key(self, *position: int) -> np.ndarray:
        return np.frombuffer(self._bytes((0, *position), 16), dtype=np.uint32)
