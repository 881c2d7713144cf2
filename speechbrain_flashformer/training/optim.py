"""The Muon optimizer, in a precision that is fast on the device.

Sources: "Muon: An optimizer for hidden layers in neural networks" (Jordan et
al., 2024), as in ``torch.optim.Muon``; the update scale that matches AdamW from
"Muon is Scalable for LLM Training" (arXiv:2502.16982, eq. 4).
"""

import torch


class Muon(torch.optim.Muon):
    """``torch.optim.Muon`` with stacked matrices and a choice of precision.

    torch orthogonalizes in bfloat16, one weight after another. On a CPU without
    bfloat16 instructions this takes more time than the network. This class uses
    float32 on such devices, and processes all matrices of one shape at once.

    Arguments
    ---------
    params : iterable
        Matrices, or parameter groups of them. A group may have ``parts``: the
        number of matrices that each of its weights stacks along the rows. See
        ``matrix_groups``.
    **options
        Options of ``torch.optim.Muon``.

    Raises
    ------
    ValueError
        If the rows of a weight cannot be divided into ``parts`` matrices.

    Example
    -------
    >>> weight = torch.nn.Parameter(torch.zeros(6, 4))
    >>> optimizer = Muon([{"params": [weight], "parts": 2}], lr=1.0)
    >>> weight.sum().backward()
    >>> optimizer.step()
    """

    def add_param_group(self, param_group):
        """Add a parameter group; the constructor calls this for each group.

        Arguments
        ---------
        param_group : dict
            ``params`` (matrices), optionally ``parts`` (1 by default), and
            other options of the group.

        Raises
        ------
        ValueError
            If the rows of a weight cannot be divided into ``parts`` matrices.
        """
        parts = param_group.setdefault("parts", 1)
        super().add_param_group(param_group)
        for weight in self.param_groups[-1]["params"]:
            if weight.shape[0] % parts:
                raise ValueError(
                    f"a weight of {weight.shape[0]} rows is not {parts} "
                    "matrices"
                )

    @torch.no_grad()
    def step(self, closure=None):
        """Update the weights.

        Arguments
        ---------
        closure : callable, optional
            Evaluates the model again and returns the loss.

        Returns
        -------
        torch.Tensor or None
            The loss of the closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights, gradients, momenta = [], [], []
            self._init_group(group, weights, gradients, momenta)
            shapes = {}
            for weight, gradient, momentum in zip(weights, gradients, momenta):
                momentum.lerp_(gradient, 1 - group["momentum"])
                update = momentum
                if group["nesterov"]:
                    update = gradient.lerp(momentum, group["momentum"])
                update = update.unflatten(0, (group["parts"], -1))
                key = update.shape, update.dtype, update.device
                shapes.setdefault(key, []).append((weight, update))
            for pairs in shapes.values():
                self._update(group, *zip(*pairs))
        return loss

    def _update(self, group, weights, updates):
        """Update weights of one shape; updates are [parts, rows, columns]."""
        rows, columns = updates[0].shape[1:]
        size = 0.2 * max(rows, columns) ** 0.5
        if group["adjust_lr_fn"] != "match_rms_adamw":
            size = max(1, rows / columns) ** 0.5
        matrices = orthogonalized(
            torch.cat(updates),
            group["ns_coefficients"],
            group["ns_steps"],
            group["eps"],
        )
        lr = float(group["lr"])
        for weight, update in zip(weights, matrices.split(group["parts"])):
            weight.mul_(1 - lr * group["weight_decay"])
            weight.add_(update.flatten(0, 1), alpha=-lr * size)


def orthogonalized(matrices, coefficients, steps, eps):
    """Move the singular values of matrices towards 1 (Newton-Schulz iteration).

    Arguments
    ---------
    matrices : torch.Tensor
        [K, rows, columns].
    coefficients : tuple of float
        Coefficients of the quintic polynomial that each step applies.
    steps : int
        Number of steps.
    eps : float
        Floor of the norm by which a matrix is divided.

    Returns
    -------
    torch.Tensor
        [K, rows, columns], in the dtype of matrices.

    Example
    -------
    >>> x = torch.diag(torch.tensor([9.0, 3.0]))[None]
    >>> y = orthogonalized(x, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    >>> bool((0.6 < y[0].diag()).all() and (y[0].diag() < 1.3).all())
    True
    """
    a, b, c = coefficients
    fast = torch.bfloat16 if has_fast_bfloat16(matrices.device) else None
    x = matrices.to(fast or torch.float32)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def has_fast_bfloat16(device):
    """Whether a device has bfloat16 instructions.

    Arguments
    ---------
    device : torch.device
        CPU, CUDA or any other device.

    Returns
    -------
    bool
        Whether it has them; False for other types than CPU and CUDA.

    Example
    -------
    >>> has_fast_bfloat16(torch.device("meta"))
    False
    """
    if device.type == "cpu":
        here = torch.cpu.get_capabilities()
        return bool(here.get("avx512_bf16") or here.get("amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(False)


def matrix_groups(module):
    """Collect the matrices of a network as parameter groups of ``Muon``.

    Arguments
    ---------
    module : torch.nn.Module
        The network. A layer may have an attribute ``stacked``: a dict from the
        name of a linear layer inside it to the number of matrices that its
        weight stacks.

    Returns
    -------
    list of dict
        Parameter groups with ``params`` and ``parts``.

    Example
    -------
    >>> from speechbrain_flashformer import FlashFormer
    >>> masknet = FlashFormer(16, d_model=48, num_layers=1)
    >>> [group["parts"] for group in matrix_groups(masknet)]
    [1, 2, 3]
    """
    parts = {}
    for layer in module.modules():
        for name, count in getattr(layer, "stacked", {}).items():
            # An adapter that replaces the layer may have no weight.
            weight = getattr(getattr(layer, name), "weight", None)
            if weight is not None:
                parts[weight] = count
    groups = {}
    for weight in module.parameters():
        if weight.ndim == 2:
            groups.setdefault(parts.get(weight, 1), []).append(weight)
    return [
        {"params": groups[count], "parts": count} for count in sorted(groups)
    ]
