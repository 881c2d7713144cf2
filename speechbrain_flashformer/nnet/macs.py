"""Count the multiply-accumulates (MACs) of a network."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count


def count_macs(function, *arguments):
    """Count the multiply-accumulates of one call, with attention products.

    MACs are FLOPs / 2. FLOPs are counted by the formulas of torch's
    ``FlopCounterMode``, plus one for the CPU flash kernel, which it ignores.

    Arguments
    ---------
    function : callable
        Function or module; called without gradients.
    *arguments
        Arguments of the function.

    Returns
    -------
    int
        Multiply-accumulates.

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
    """Sums torch's FLOP formulas over the operators that run."""

    def __init__(self):
        super().__init__()
        self.flops = 0
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        self.formulas = {**flop_registry, kernel: _attention}

    @classmethod
    def _should_skip_dynamo(cls):
        # Nothing is compiled here, and importing dynamo takes 1 to 2 seconds.
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operator and count it."""
        kwargs = kwargs or {}
        formula = self.formulas.get(func._overloadpacket)
        if formula is None and func.namespace == "aten":
            # Inference mode dispatches composite operators: decompose them.
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
