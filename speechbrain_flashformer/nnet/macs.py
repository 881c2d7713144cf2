"""Compute of a network, counted."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count


def count_macs(function, *arguments):
    """Multiply-accumulates of one call, attention products included.

    FLOPs / 2, as torch's ``FlopCounterMode`` counts them, and the flash kernel
    for CPU, which that passes over.

    Arguments
    ---------
    function : callable
        Runs without gradients.
    *arguments
        Handed to it.

    Returns
    -------
    int
        MACs.

    Example
    -------
    >>> count_macs(torch.nn.Linear(10, 20), torch.zeros(3, 10))
    600
    """

    counter = _Counter()
    with counter, torch.no_grad():
        function(*arguments)
    return counter.flops // 2


class _Counter(TorchDispatchMode):
    """Sums torch's own formulas over the operators that run."""

    def __init__(self):
        super().__init__()
        self.flops = 0
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        self.formulas = {**flop_registry, kernel: _attention}

    @classmethod
    def _should_skip_dynamo(cls):
        # Nothing is compiled here, and its import takes a second or two.
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operator and count it."""
        kwargs = kwargs or {}
        formula = self.formulas.get(func._overloadpacket)
        if formula is None and func.namespace == "aten":
            # In inference mode they come whole: count what they are made of.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if formula:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


def _attention(q, k, v, *_, **__):
    return sdpa_flop_count(q.shape, k.shape, v.shape)
