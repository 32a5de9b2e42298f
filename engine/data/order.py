"""Orders of documents and batches, each a pure function of its arguments on every machine."""

import numpy as np
from numpy.typing import NDArray


def permutation(key: int, counter: int, length: int) -> NDArray[np.int64]:
    """A permutation of range(length), a pure function of its arguments on every machine.

    The order of `length` raw Philox words under the key (key, counter); a tie, of probability
    length²/2⁶⁵, keeps the smaller index first.
    """
    words = np.random.Philox(key=np.array([key, counter], dtype=np.uint64)).random_raw(length)
    return np.argsort(words, kind="stable")


def batch_order(seed: int, rows: int, length: int) -> NDArray[np.int32]:
    """The row at each of the first `length` places of the data stream, [length] int32.

    Every epoch of `rows` places is a permutation of the rows by (seed, epoch), so place p depends
    on (seed, p) only; step s of a run with batch B takes places s·B … (s + 1)·B - 1.
    """
    epochs = -(-length // rows)
    order = [permutation(seed, epoch, rows) for epoch in range(epochs)]
    return np.concatenate([np.empty(0, np.int64), *order])[:length].astype(np.int32)
