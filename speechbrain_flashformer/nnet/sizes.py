"""Sizes of the network, checked when it is built."""


def check_counts(**counts):
    """Raise a ValueError that names the first count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be 1 or more, got {count}")


def check_lookahead(future_tokens, causal):
    """Raise a ValueError for a negative lookahead, or one without causal."""
    if future_tokens < 0 or (future_tokens and not causal):
        raise ValueError(
            "future_tokens must be 0 or more, and 0 unless causal, got "
            f"{future_tokens}"
        )


def rate_widths(d_frame, d_model, token_stride):
    """Widths of all rates, from frames to tokens, at a constant ratio.

    Arguments
    ---------
    d_frame, d_model : int
        Width of frames and of tokens.
    token_stride : int
        Frames per token, a power of two.

    Returns
    -------
    list of int
        log2(token_stride) + 1 widths. Those between d_frame and d_model are
        multiples of 16, for fast kernels. Only d_model if token_stride is 1.

    Raises
    ------
    ValueError
        If token_stride is not a power of two, or a width is below 1.

    Example
    -------
    >>> rate_widths(96, 384, token_stride=8)
    [96, 160, 240, 384]
    """
    steps = max(token_stride, 1).bit_length() - 1
    if token_stride != 2**steps:
        raise ValueError(
            f"token_stride must be a power of two, got {token_stride}"
        )
    check_counts(d_frame=d_frame, d_model=d_model)
    if not steps:
        return [d_model]
    growth = (d_model / d_frame) ** (1 / steps)
    between = (d_frame * growth**i for i in range(1, steps))
    widths = [16 * max(1, round(width / 16)) for width in between]
    return [d_frame, *widths, d_model]
