"""An added network: an LSTM with its gates written out. Mirrors engine/models/ and engine/family.py.

Letters: B batch, T time, D width, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from engine.family import Family
from engine.models import normal_weights, parameter_shapes
from engine.network import Network
from engine.tokenizer import ByteTokenizer

MIRRORS = ("engine/models/", "engine/family.py")


@dataclass(frozen=True)
class LSTMOptions:
    """A byte-level LSTM of one layer."""

    cells: int = 8  # hidden units


class LSTM(nn.Module):
    """One replica."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Parameter(torch.empty(vocabulary, width))
        self.gates = nn.Parameter(torch.empty(4 * width, 2 * width))
        self.bias = nn.Parameter(torch.empty(4 * width))
        self.unembedding = nn.Parameter(torch.empty(vocabulary, width))

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, hyper: dict[str, Tensor], key_3: Tensor) -> Tensor:
        """Summed loss, 0-dim; hyper: `leak`, the share of the hidden state that stays as it was."""
        hidden_BD = cell_BD = torch.zeros_like(self.embedding[tokens_BT[:, 0]])
        outputs = []
        for x_BD in self.embedding[tokens_BT].unbind(1):
            gates = functional.linear(torch.cat([x_BD, hidden_BD], -1), self.gates, self.bias)
            enter, forget, out, candidate = gates.chunk(4, -1)
            cell_BD = forget.sigmoid() * cell_BD + enter.sigmoid() * candidate.tanh()
            fresh_BD = out.sigmoid() * cell_BD.tanh()
            hidden_BD = fresh_BD + hyper["leak"] * (hidden_BD - fresh_BD)
            outputs.append(hidden_BD)
        logits_BTV = functional.linear(torch.stack(outputs, 1), self.unembedding)
        return functional.cross_entropy(
            logits_BTV.flatten(0, 1), targets_BT.flatten().long(), ignore_index=-100, reduction="sum"
        )


def build(config, device) -> Network:
    """The network of a configuration."""
    tokenizer, width = ByteTokenizer(), config.shape.cells
    with torch.device("meta"):
        module = LSTM(tokenizer.vocabulary, width)
    shapes = parameter_shapes(module)
    group = {"gates": "recurrent", "bias": "recurrent"}
    return Network(
        module=module,
        shapes=shapes,
        groups={name: (group.get(name, name),) for name in shapes},
        initial=lambda seed: {name: normal_weights(seed, name, shape, 0.3) for name, shape in shapes.items()},
        tokenizer=tokenizer,
        vocabulary=tokenizer.vocabulary,
        flops_per_token=6.0 * (8 * width * width + tokenizer.vocabulary * width),
        activation_bytes=lambda tokens, element: tokens * element * (16 * width + tokenizer.vocabulary),
    )


FAMILY = Family(
    help="an LSTM over bytes",
    workload="language",
    options=LSTMOptions,
    groups={"recurrent": "", "embedding": "", "unembedding": ""},
    precisions=("bf16", "fp32"),
    automatic_precision={"cpu": "fp32", "cuda": "fp32"},
    axes=("lr:log:1e-3:1e1:3", "tokens:linear:32:96:3"),
    build=build,
    hyper=("leak",),
    title=lambda options: f"{options.cells} cells",
)
