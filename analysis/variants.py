"""What a run is compared with to learn how much of its outcome is noise: the same runs, otherwise rounded or ordered.

- repeat: nothing changed but the stack a cell trains in; on a GPU cells are batch-invariant and no label changes.
- precision: the network's finest precision, or its coarsest where the map has the finest, if that one
  tells neighbouring cells apart at all; it then says how deep the coarsest goes, and the map's own deeper.
- order: other seeds, thus other initial weights and data orders (language models).
- permuted: the same hidden units in another order (the paper's network): the same mathematics,
  rounded differently.
"""

from engine.config import SweepConfig
from engine.store import Replicate

VARIANTS = ("repeat", "precision", "order", "permuted")


def check_variants(text: str) -> list[str]:
    """The variants of a list with commas between; '' for all. Raises ValueError for an unknown one."""
    chosen = [name.strip() for name in text.split(",")] if text else list(VARIANTS)
    unknown = [name for name in chosen if name not in VARIANTS]
    if unknown:
        raise ValueError(f"variants has {', '.join(unknown)}; expected some of {', '.join(VARIANTS)}")
    return chosen


def own_config(store: Replicate) -> SweepConfig:
    """The configuration of one replicate of a store, alone."""
    config = store.config.change(replicates=1)
    return config if "seed" in store.run.names else config.change(seed=store.config.seed + store.index)


def variants(store: Replicate) -> dict[str, list[SweepConfig]]:
    """The configurations that a map of this store is compared with, where that can be."""
    config = own_config(store)
    made, other = {"repeat": [config]}, other_precision(config)
    if store.grid.y.distinct(other) and store.grid.x.distinct(other):
        made["precision"] = [config.change(precision=other)]
    return made | config.workload.order(store)


def other_precision(config: SweepConfig) -> str:
    """The precision to compare with: the finest one, or the coarsest where the finest is the map's own."""
    coarsest, *_, finest = config.family.precisions
    return finest if config.swept.precision != finest else coarsest


def coarser_precision(config: SweepConfig) -> str:
    """`other_precision` where it is coarser than the map's own, else ''."""
    return other_precision(config) if config.swept.precision == config.family.precisions[-1] else ""
