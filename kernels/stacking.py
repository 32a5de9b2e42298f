"""How one-replica calls become stacked ones: the vmap rule that every operator of this package shares.

A stacked operator takes tensors [R, ...] and treats each replica alone. Vmapping it over N is
therefore the same operator over N * R replicas, and that one rule (`fold_vmap`) serves all of them.
The one-replica function a network calls is the stacked operator at R = 1; under
`torch.func.vmap` over R replicas it becomes a single stacked call, with autograd outside vmap.
"""

import torch


class Operator:
    """An operator of the dispatcher, as `torch.library.custom_op` makes it, without that wrapper's first call.

    The wrapper guards every call against torch.compile's tracer and imports the compiler for it: about
    four seconds at the start of each process, for something this project does not use. Registered
    directly, the operator traces, differentiates and vmaps all the same.
    """

    def __init__(self, name, function):
        self.name = name
        torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(name, "default", function)
        namespace, short = name.split("::")
        self.call = getattr(getattr(torch.ops, namespace), short).default

    def __call__(self, *arguments, **named):
        return self.call(*arguments, **named)

    def register_fake(self, function):
        torch.library.register_fake(self.name, function)

    def register_autograd(self, backward, *, setup_context):
        torch.library.register_autograd(self.name, backward, setup_context=setup_context)

    def register_vmap(self, rule):
        torch.library.register_vmap(self.name, rule)


def custom_operator(name):
    """Decorator: register a function of tensors that mutates none of them as the operator `name`."""
    return lambda function: Operator(name, function)


def fold_vmap(operator):
    """Give the custom operator its vmap rule: fold the mapped dimension into the replicas.

    Every tensor argument and result of `operator` must lead with the replica dimension. An
    argument that vmap does not map is shared: it becomes an expanded view with replica stride 0.
    """

    def rule(info, in_dims, *arguments):
        folded = [
            _fold(argument, in_dim, info.batch_size) if isinstance(argument, torch.Tensor) else argument
            for argument, in_dim in zip(arguments, in_dims, strict=True)
        ]
        results = operator(*folded)
        if isinstance(results, torch.Tensor):
            return results.unflatten(0, (info.batch_size, -1)), 0
        unfolded = tuple(result.unflatten(0, (info.batch_size, -1)) for result in results)
        return unfolded, (0,) * len(unfolded)

    operator.register_vmap(rule)
    return operator


def _fold(tensor, in_dim, batch_size):
    if in_dim is None:
        tensor = tensor.expand(batch_size, *tensor.shape)
    else:
        tensor = tensor.movedim(in_dim, 0)
    return tensor.flatten(0, 1)


def dense_replicas(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor [R, ...] itself if each replica is contiguous (any replica stride), else a contiguous copy.

    A view of one [R, P] parameter buffer passes as it is; kernels take its replica stride.
    """
    return tensor if tensor[0].is_contiguous() else tensor.contiguous()


def dot_precision() -> str:
    """Triton's float32 dot precision for torch's: "highest" -> "ieee", "high" or "medium" -> "tf32"."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
