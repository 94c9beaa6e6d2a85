"""Where a model trains: on how many devices, in how many processes, and what these agree on."""

import dataclasses
import hashlib
import json
import secrets
from collections.abc import Callable
from typing import Any

import numpy as np

from lipdp.randomness import SharedSource

__all__ = [
    "SINGLE_DEVICE",
    "Devices",
    "SharedSource",
    "require_same_run",
    "digest",
    "broadcast_from_chief",
]


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices that share out the rows of each batch, and this process among theirs.

    Attributes:
        replicas: how many parts a batch is cut into, one a device.
        process: number of this process; the first one is the chief, which writes the ledger.
        processes: how many there are. Each has equally many of the replicas, in order.
        distributed: whether the backend hands a batch out part by part.

    >>> Devices(replicas=4, process=1, processes=2).local
    2
    """

    replicas: int = 1
    process: int = 0
    processes: int = 1
    distributed: bool = False

    @property
    def local(self) -> int:
        """Replicas of this process."""
        return self.replicas // self.processes

    @property
    def chief(self) -> bool:
        return self.process == 0


#: One device, one process.
SINGLE_DEVICE = Devices()


def digest(*arrays: Any) -> str:
    """A name for what arrays hold.

    >>> digest(np.zeros(2)) == digest(np.zeros(2)) != digest(np.zeros(3))
    True
    """
    hashed = hashlib.blake2b(digest_size=16)
    for array in map(np.asarray, arrays):
        hashed.update(f"{array.dtype.str}{array.shape}".encode())
        hashed.update(np.ascontiguousarray(array).data)
    return hashed.hexdigest()


def broadcast_from_chief(
    gather: Callable[[np.ndarray], np.ndarray], own: Devices, fact: Any
) -> Any:
    """What the chief says of `fact`, which JSON can tell.

    Args:
        gather: maps an int32 array of one process to those of all, `(processes, ...)`.
        own: devices of this process.
        fact: the chief's word; that of others is not asked for.
    """
    text = np.frombuffer(json.dumps(fact).encode() if own.chief else b"", np.uint8)
    length = int(gather(np.array([len(text)], np.int32))[0, 0])
    told = gather(text.astype(np.int32) if own.chief else np.zeros(length, np.int32))
    return json.loads(told[0].astype(np.uint8).tobytes())


def require_same_run(
    gather: Callable[[np.ndarray], np.ndarray], own: Devices, facts: dict[str, Any]
) -> SharedSource:
    """Randomness for a run of several processes, once they have the same run in mind.

    Args:
        gather: maps an int32 array of one process to those of all, `(processes, ...)`.
        own: devices of this process.
        facts: what has to be the same in all of them, as JSON can tell it.

    Raises:
        ValueError: the processes differ; every one of them raises it.
    """
    digests = [
        hashlib.blake2b(json.dumps(fact, sort_keys=True).encode(), digest_size=16).digest()
        for fact in facts.values()
    ]
    mine = np.stack([np.frombuffer(d, np.int32) for d in digests])
    secret = secrets.token_bytes(32) if own.chief else bytes(32)
    told = gather(np.concatenate([mine, np.frombuffer(secret, np.int32).reshape(2, 4)]))
    differ = [
        name
        for i, name in enumerate(facts)
        if any((told[p, i] != told[0, i]).any() for p in range(own.processes))
    ]
    if differ:
        raise ValueError(
            f"The {own.processes} processes of this run differ in {', '.join(differ)}: each "
            "must be given the same model, the same data set (all of it, in the same order: which "
            "rows a process reads is worked out here) and the same arguments. This is process "
            f"{own.process}, with " + ", ".join(f"{name} {facts[name]!r}" for name in differ) + "."
        )
    return SharedSource(told[0, -2:].astype(np.int32).tobytes())
