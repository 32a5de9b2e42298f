"""How much data a sweep trains on: what the data hold, and how often each budget sees them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.plan import Plan, unique_rows

if TYPE_CHECKING:
    from engine.data import Corpus

SHOWN = 6  # budgets that the dry run names


def amount_of(corpus: "Corpus") -> dict[str, int]:
    """What a store keeps: documents trained on and in all, rows of the context, and their tokens, an epoch."""
    rows, context = corpus.tokens.shape
    read, all_of_them = corpus.documents, corpus.documents_in_all
    return {"documents": read, "documents_in_all": all_of_them, "rows": rows, "tokens": rows * context}


def short_name(data: str) -> str:
    """The data's name without its folders, of a mix each part's."""
    return " + ".join(Path(part).name for part in data.split(","))


def amount_words(data: str, amount: Mapping[str, Any] | None) -> str:
    """The data's name and size in a few words; the name alone where no size is known."""
    name = short_name(data)
    if amount is None:
        return name
    some = f" of {amount['documents_in_all']:,}" if amount["documents_in_all"] != amount["documents"] else ""
    return f"{name}, {amount['documents']:,}{some} documents, {amount['tokens']:,} tokens to train on"


def epochs_of(plan: Plan, amount: Mapping[str, Any]) -> np.ndarray:
    """How often each cell's run sees its data, float64 [replicate, *cells]."""
    return plan.steps * plan.run.column("batch") / np.minimum(unique_rows(plan.run), amount["rows"])


def epochs_words(plan: Plan, amount: Mapping[str, Any]) -> str:
    """How many epochs the budgets are, and from which on data are seen again."""
    epochs = epochs_of(plan, amount)
    budgets, first = np.unique((plan.steps * plan.cost).ravel(), return_index=True)
    shown = np.unique(np.linspace(0, len(budgets) - 1, SHOWN).round().astype(int))
    said = ", ".join(f"{epochs.ravel()[first[i]]:.2g} at {budgets[i]:,.0f}" for i in shown)
    again = (epochs > 1).mean()
    more = f"; {again:.0%} of the cells see data again" if again else ""
    return f"{said} tokens{more}"
