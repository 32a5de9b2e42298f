"""Tensors of a checkpoint under our names: what a file holds, and how its tensors become ours.

A layout says for each of our parameters which stored tensors its rows come from, so one table
serves reading (join) and writing (split). Names and shapes are checked when a checkpoint is opened;
a parameter is read, in the dtype it is stored in, when it is asked for, so that a network on its way
to a device takes no more of the host's memory than one parameter.

The .safetensors format (github.com/huggingface/safetensors) is eight bytes of length, a JSON
header, and data. It is read here, since the library maps the whole file into memory beside what is
copied out of it; it is written by the library.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PADDING = 128
"""a padded vocabulary has fewer rows than this too many"""


class Stored(NamedTuple):
    """One tensor of a file: its shape, its dtype, and how it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class Source(NamedTuple):
    """Where a parameter of ours comes from.

    names: stored tensors whose rows are joined. rows: of each, None where there is one. transposed:
    stored as [in, out]. padded: more rows than ours may be stored, which are left out. swapped: head
    dimension K of tensors whose heads are stored with their halves swapped, 0 for none. paired: K of
    tensors whose heads are stored by neighbouring pairs (2i, 2i + 1) instead of (i, i + K/2), 0 for none.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...] = ()
    transposed: bool = False
    padded: bool = False
    swapped: tuple[int, ...] = ()
    paired: tuple[int, ...] = ()


Layout = dict[str, Source]


class Weights(Mapping[str, Tensor]):
    """Parameters by name, each read anew whenever it is asked for: none of them is kept."""

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]]):
        self.readers = dict(readers)

    def __getitem__(self, name: str) -> Tensor:
        return self.readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)


def read_safetensors(file: Path) -> dict[str, Stored]:
    """The tensors of a .safetensors file; ValueError where it is cut, or none, naming the tensor."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(length) if length <= size - 8 else b""
    try:
        described = json.loads(header)
    except ValueError as error:
        raise ValueError(f"{file} is no .safetensors file or its header is cut: fetch it again") from error
    stored = {}
    for name, fields in described.items():
        if name == "__metadata__":
            continue
        dtype, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        if dtype not in DTYPES:
            raise ValueError(f"{file} holds {name} as {dtype}, expected {', '.join(DTYPES)}: convert it")
        if 8 + length + end > size:
            raise ValueError(f"{file} ends at byte {size}, inside of tensor {name}: fetch it again")
        stored[name] = Stored(shape, DTYPES[dtype], _reader(file, 8 + length + begin, end - begin, dtype, shape))
    return stored


def _reader(file: Path, offset: int, count: int, dtype: str, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    def read() -> Tensor:
        data = np.fromfile(file, np.uint8, count, offset=offset)
        return torch.from_numpy(data).view(DTYPES[dtype]).view(shape)

    return read


def in_memory(tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """Tensors that are there, or mapped into memory, as stored ones."""
    return {name: Stored(tuple(t.shape), t.dtype, t.detach) for name, t in tensors.items()}


def join(
    stored: Mapping[str, Stored],
    layout: Layout,
    shapes: Mapping[str, tuple[int, ...]],
    path: Path,
    ignored: Callable[[str], bool] = lambda name: False,
) -> Weights:
    """Our parameters, by name, of the given shapes.

    Raises ValueError for a tensor that is missing, of another shape, without fractions, or unknown
    (unless `ignored`).
    """
    known = {name for source in layout.values() for name in source.names}
    for name in sorted(stored.keys() - known):
        if not ignored(name):
            raise ValueError(f"{path} holds tensor {name}, which no network that it says it is has: {_FOREIGN}")
    for ours, source in layout.items():
        for name, rows in zip(source.names, source.rows or shapes[ours][:1], strict=True):
            if name not in stored:
                raise ValueError(f"{path} lacks tensor {name}: {_FOREIGN}")
            expected = (rows, *shapes[ours][1:])
            _check(path, name, stored[name], expected[::-1] if source.transposed else expected, source.padded)
    return Weights({ours: partial(_read, stored, source, shapes[ours]) for ours, source in layout.items()})


def _read(stored: Mapping[str, Stored], source: Source, shape: tuple[int, ...]) -> Tensor:
    """One parameter of ours out of the tensors that hold it."""
    parts = []
    for index, (name, rows) in enumerate(zip(source.names, source.rows or shape[:1], strict=True)):
        part = stored[name].read()
        part = part.T.contiguous() if source.transposed else part[:rows]
        if source.swapped:
            part = swap_halves(part, source.swapped[index])
        if source.paired:
            part = unpair(part, source.paired[index])
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


_FOREIGN = "give a whole checkpoint of a family named in the README"


def _check(path: Path, name: str, stored: Stored, expected: tuple[int, ...], padded: bool) -> None:
    got = stored.shape
    fits = len(got) == len(expected) and got[1:] == expected[1:]
    rows = got[0] - expected[0] if fits and got else 0
    if not fits or rows < 0 or rows >= (PADDING if padded else 1):
        raise ValueError(f"{path} holds tensor {name} of shape {list(got)}, expected {list(expected)}: {_FOREIGN}")
    if not stored.dtype.is_floating_point:
        raise ValueError(f"{path} holds tensor {name} as {stored.dtype}, expected floating point: {_FOREIGN}")


def split(weights: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The tensors to store of our parameters, the inverse of `join`; contiguous, CPU."""
    tensors = {}
    for ours, source in layout.items():
        parts = weights[ours].split(source.rows) if source.rows else (weights[ours],)
        for index, (name, part) in enumerate(zip(source.names, parts, strict=True)):
            part = swap_halves(part, source.swapped[index]) if source.swapped else part
            tensors[name] = (part.T if source.transposed else part).cpu().contiguous().clone()
    return tensors


def swap_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k with the halves of each head swapped: a rotation by minus its angle; 0 leaves them."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).flip(1).flatten(0, 2) if head_dim else rows


def unpair(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k from neighbouring pairs (2i, 2i + 1) of each head to pairs (i, i + K/2); 0 leaves them."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2) if head_dim else rows
