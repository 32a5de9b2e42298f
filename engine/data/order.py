"""Orders of documents and batches, each a pure function of its arguments on every machine."""

import numpy as np
from numpy.typing import NDArray

from engine.schedule import SLACK


def permutation(key: int, counter: int, length: int) -> NDArray[np.int64]:
    """A permutation of range(length), a pure function of its arguments on every machine.

    The order of `length` raw Philox words under the key (key, counter); a tie, of probability
    length²/2⁶⁵, keeps the smaller index first.
    """
    words = np.random.Philox(key=np.array([key, counter], dtype=np.uint64)).random_raw(length)
    return np.argsort(words, kind="stable")


def epoch_order(seed: int, epoch: int, first: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows of an epoch in order, int64 [n]; `first`: those of epoch 0."""
    return np.sort(first)[permutation(seed, epoch, len(first))] if epoch else first


def batch_order(seed: int, rows: int, length: int, unique: int | None = None) -> NDArray[np.int32]:
    """The row at each of the first `length` places of the data stream, [length] int32.

    Epoch 0 is a permutation of the rows by seed, of which a run over `unique` rows (default: all) takes the first so
    many; every further epoch is a permutation of these by (seed, epoch). So place p depends on (seed, unique, p) only,
    while p < unique on (seed, p); step s of a run with batch B takes places s·B … (s + 1)·B - 1.
    """
    first = permutation(seed, 0, rows)[:unique]
    epochs = range(-(-length // len(first)))
    order = [np.empty(0, np.int64), *(epoch_order(seed, epoch, first) for epoch in epochs)]
    return np.concatenate(order)[:length].astype(np.int32)


def rows_that_hold(
    tokens: NDArray[np.float64], seed: int, counts_N: NDArray[np.int32], unique: int | None = None
) -> NDArray[np.int64]:
    """The fewest rows of a run's stream (see `batch_order`) that hold so many tokens, for each of some budgets.

    counts_N: what each row of the training set adds, at least 1.
    """
    first = permutation(seed, 0, len(counts_N))[:unique]
    epoch_tokens = int(counts_N[first].sum(dtype=np.int64))
    wanted = np.asarray(tokens * SLACK)
    epochs = np.maximum(np.ceil(wanted / epoch_tokens) - 1, 0).astype(np.int64)  # that pass before
    found = np.empty(wanted.shape, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        held = counts_N[epoch_order(seed, int(epoch), first)].cumsum(dtype=np.int64)
        found[here] = epoch * len(first) + np.searchsorted(held, wanted[here] - epoch * epoch_tokens) + 1
    return found
