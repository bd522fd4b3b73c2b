"""The order of samples: step k's samples as a pure function of (seed, number of samples, position).

Position p of the run is entry p mod N of the permutation of epoch p div N. It is computed directly, so that a resume at
step 10^6 costs the same as one at step 1; it does not depend on the world size.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from trainer.bucket.hashing import MASK

ARGSORT_UP_TO = 65536
ROUNDS = 8
_STEP = np.uint64(0x9E3779B97F4A7C15)
_OF_ITEMS, _OF_ORDERS = 1, 2
"""What else a hash of (seed, epoch) is for."""


def sample_ids(seed: int, n_samples: int, start: int, stop: int) -> np.ndarray:
    """The samples at positions [start, stop) of the run, int64; the range may span epochs."""
    parts = []
    while start < stop:
        epoch, first = divmod(start, n_samples)
        last = min(n_samples, first + stop - start)
        parts.append(epoch_ids(seed, n_samples, epoch, first, last))
        start += last - first
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def step_ids(seed: int, n_samples: int, global_batch_size: int, step: int, offset: int = 0) -> np.ndarray:
    """The samples of a step (from 0): positions [step * B, (step + 1) * B) of the run, shifted by `offset`.

    The offset is 0 while B has never changed. After a change, it makes the steps continue after the samples consumed.
    """
    start = step * global_batch_size + offset
    return sample_ids(seed, n_samples, start, start + global_batch_size)


def micro_steps(ids: np.ndarray, micro_batch_size: int) -> list[np.ndarray]:
    """Cut a step's samples into pieces; rank r of w runs the pieces r, r + w, ..."""
    return [ids[start : start + micro_batch_size] for start in range(0, len(ids), micro_batch_size)]


def epoch_ids(seed: int, n_samples: int, epoch: int, first: int, last: int) -> np.ndarray:
    """Entries [first, last) of an epoch's permutation, int64."""
    if n_samples <= ARGSORT_UP_TO:
        return _shuffled(seed, n_samples, epoch)[first:last]
    return _feistel(_key(seed, epoch), n_samples, np.arange(first, last, dtype=np.int64))


def item_seeds(seed: int, epoch: int, first: int, last: int) -> np.ndarray:
    """A seed of 63 bits for the random numbers of each place [first, last) of an epoch, uint64."""
    keys = np.arange(first, last, dtype=np.uint64) * _STEP + np.uint64(_key(seed, epoch, _OF_ITEMS))
    return _mix(keys) >> np.uint64(1)


def order_seed(seed: int, epoch: int) -> int:
    """A seed of 63 bits for a given order of an epoch."""
    return _key(seed, epoch, _OF_ORDERS) >> 1


def fingerprint(ids: np.ndarray, first: int) -> int:
    """The fingerprint of the samples at the places from `first` on of a step: a sum over them, in `hashing.MASK`."""
    places = _mix(np.arange(first, first + len(ids), dtype=np.uint64) * _STEP)
    return int(_mix(places + ids.astype(np.uint64) * _STEP + _STEP).sum(dtype=np.uint64)) & MASK


@lru_cache(maxsize=4)
def _shuffled(seed: int, n_samples: int, epoch: int) -> np.ndarray:
    """A whole permutation: the samples sorted by random keys."""
    keys = _mix(np.arange(n_samples, dtype=np.uint64) * _STEP + np.uint64(_key(seed, epoch)))
    return np.argsort(keys, kind="stable").astype(np.int64)


def _feistel(key: int, n_samples: int, positions: np.ndarray) -> np.ndarray:
    """Entries of a permutation of range(n_samples) at some positions, computed without the rest of it.

    An additive Feistel network on a grid of about sqrt(N) x sqrt(N) cells permutes the cells, with any round function.
    A cell beyond N is mapped again until it falls inside (cycle walking; Black and Rogaway 2002).
    """
    rows = math.isqrt(n_samples - 1) + 1
    columns = -(-n_samples // rows)
    found = positions.copy()
    outside = np.ones(len(found), dtype=bool)
    while outside.any():
        left, right = np.divmod(found[outside], columns)
        for number in range(ROUNDS):
            salt = np.uint64(_key(key, number))
            if number % 2:
                shift = _mix(right.astype(np.uint64) * _STEP + salt) % np.uint64(rows)
                left = (left + shift.astype(np.int64)) % rows
            else:
                right = (
                    right + (_mix(left.astype(np.uint64) * _STEP + salt) % np.uint64(columns)).astype(np.int64)
                ) % columns
        found[outside] = left * columns + right
        outside = found >= n_samples
    return found


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def _key(*parts: int) -> int:
    """Hash integers to 64 bits."""
    state = np.uint64(0)
    for part in parts:
        state = _mix(np.array([(int(state) + part * int(_STEP) + int(_STEP)) % 2**64], dtype=np.uint64))[0]
    return int(state)
