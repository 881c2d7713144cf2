"""Compute of a network, counted."""

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def count_macs(function, *arguments):
    """Multiply-accumulates of one call, attention products included.

    FLOPs / 2 by torch's ``FlopCounterMode``, which passes over the flash
    kernel for CPU unless told of it.

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

    def _attention(q, k, v, *_, **__):
        return sdpa_flop_count(q, k, v)

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(
        display=False, custom_mapping={kernel: _attention}
    )
    with counter, torch.no_grad():
        function(*arguments)
    return counter.get_total_flops() // 2
