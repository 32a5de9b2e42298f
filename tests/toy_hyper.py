"""An added hyper-parameter, read by the added network's forward. Mirrors engine/hyper.py."""

from engine.hyper import HyperParameter

MIRRORS = ("engine/hyper.py",)
LEAK = HyperParameter("forward", "share of the hidden state that stays as it was", 0.0, "leak", high=1.0)
