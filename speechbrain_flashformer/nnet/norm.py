"""Input norms that weight frames by their amplitude.

One mean and one variance for all channels of many frames preserve the level
differences between frames, which a norm per frame would remove. Conv-TasNet's
gLN (arXiv:1809.07454, eq. 9 to 11) weights all frames equally, so that silence
around speech raises the level of the normalized speech. Here silence has no
effect. Weighting by energy would ignore silence too, but one click could then
dominate the statistics of a whole recording.

Axes: B batch, L frames, N channels.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

# Floor of the denominator, so that digital silence and its gradient stay
# finite. It is far below the amplitude of one frame at the level of eps.
FLOOR = 1e-20


def weighted_sums(x, mask=None):
    """Summands of the amplitude-weighted mean and mean square.

    The weight of a frame is its amplitude: the root mean square over channels.
    To obtain mean and mean square over a set of frames, sum over these frames
    and divide the first two entries by the third (see ``moments``).

    Arguments
    ---------
    x : torch.Tensor
        [B, L, N], float32 or float64: the squares would overflow float16.
    mask : torch.Tensor, optional
        [B, L, 1], 0 at padded frames.

    Returns
    -------
    torch.Tensor
        [B, 3, L]: weight times mean, weight times mean square, and weight.

    Example
    -------
    >>> x = torch.tensor([[[1.0, 7.0], [0.0, 0.0]]])  # second frame: silence
    >>> weighted_sums(x)
    tensor([[[ 20.,   0.],
             [125.,   0.],
             [  5.,   0.]]])
    """
    # vector_norm takes one pass over the channels, and autograd need not store
    # the squares.
    amplitude = torch.linalg.vector_norm(x, dim=2) / x.shape[2] ** 0.5
    weight = amplitude if mask is None else amplitude * mask.squeeze(2)
    sums = [weight * x.mean(2), weight * amplitude.square(), weight]
    return torch.stack(sums, 1)


def moments(sums):
    """Mean and mean square from sums of ``weighted_sums``.

    Arguments
    ---------
    sums : torch.Tensor
        [B, 3, ...], summed over frames.

    Returns
    -------
    tuple of torch.Tensor
        Mean and mean square, [B, ...] each; 0 if all frames are silent.

    Example
    -------
    >>> x = torch.tensor([[[1.0, 7.0], [0.0, 0.0]]])
    >>> mean, power = moments(weighted_sums(x).sum(2))
    >>> mean.item(), power.item()
    (4.0, 25.0)
    """
    return (sums[:, :2] / sums[:, 2:].clamp(min=FLOOR)).unbind(1)


def _promote(x):
    """Cast to float32 at least: the squares would overflow float16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class GlobalNorm(nn.Module):
    """Norm over all channels and valid frames of a recording.

    Arguments
    ---------
    channels : int
        N.
    eps : float
        Floor of the standard deviation, so that silence stays finite. It is
        small enough that the level of a recording makes no difference.

    Example
    -------
    >>> norm, x = GlobalNorm(16), torch.randn(2, 50, 16)
    >>> silence = torch.zeros(2, 500, 16)
    >>> among = norm(torch.cat([silence, x], 1))[:, 500:]
    >>> torch.allclose(among, norm(x), atol=1e-5)
    True
    """

    def __init__(self, channels, eps=1e-8):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def reference(self, x, mask=None):
        """Compute the statistics that frames are normalized by.

        Arguments
        ---------
        x : torch.Tensor
            [B, L, N], all frames of the recordings.
        mask : torch.Tensor, optional
            [B, L, 1], 0 at padded frames.

        Returns
        -------
        tuple of torch.Tensor
            Mean and mean square, [B] each.
        """
        return moments(weighted_sums(_promote(x), mask).sum(2))

    def forward(self, x, given=None):
        """Normalize the frames of recordings.

        Arguments
        ---------
        x : torch.Tensor
            [B, L, N].
        given : tuple of torch.Tensor, optional
            The ``reference`` of the recordings that x is an excerpt of; by
            default that of x.

        Returns
        -------
        torch.Tensor
            [B, L, N].
        """
        wide = _promote(x)
        mean, power = (s.to(wide) for s in given or self.reference(x))
        variance = (power - mean.square()).clamp(min=0)
        scale = (variance + self.eps**2).rsqrt()
        # gain * x + shift takes one pass over the frames.
        gain = scale[:, None, None] * self.weight
        shift = self.bias - mean[:, None, None] * gain
        return torch.addcmul(shift, wide, gain).to(x.dtype)


class CumulativeNorm(GlobalNorm):
    """Causal ``GlobalNorm``: at each frame, over the last ``span`` frames.

    The parameters are those of ``GlobalNorm``. The span is bounded, so that a
    loud word lowers the level of the next ``span`` frames only.

    Arguments
    ---------
    channels : int
        N.
    span : int
        Frames that the statistics cover, with the current one.
    eps : float
        As in ``GlobalNorm``.

    Example
    -------
    >>> norm = CumulativeNorm(16, span=100)
    >>> x = torch.randn(2, 50, 16)
    >>> torch.allclose(norm(x)[:, :20], norm(x[:, :20]), atol=1e-6)
    True
    """

    def __init__(self, channels, span, eps=1e-8):
        super().__init__(channels, eps)
        self.span = span

    def make_streaming_context(self, like):
        """Create the context of new streams, whose past is silence.

        Arguments
        ---------
        like : torch.Tensor
            [B, ...]; gives the batch size, the dtype and the device.

        Returns
        -------
        dict
            ``sums`` [B, 3, span], the ``weighted_sums`` of the past.
        """
        wide = torch.promote_types(like.dtype, torch.float32)
        return {"sums": like.new_zeros(len(like), 3, self.span, dtype=wide)}

    def reference(self, x, mask=None):
        """Create the context of whole recordings, whose past is silence.

        The mask is not needed: padding follows all valid frames.
        """
        return self.make_streaming_context(x)

    def forward(self, x, context=None):
        """Normalize frames by the statistics of the past.

        Arguments
        ---------
        x : torch.Tensor
            [B, L, N].
        context : dict, optional
            From ``make_streaming_context``, updated in place; x holds the next
            frames of the streams.

        Returns
        -------
        torch.Tensor
            [B, L, N].
        """
        context = context or self.reference(x)
        past = context["sums"]
        wide = x.to(past.dtype)
        new, size = weighted_sums(wide), x.shape[1]
        known = torch.cat([past, new], 2)
        context["sums"] = known[:, :, size:]
        # Sums over the last span frames: the remainder of the previous block of
        # span frames plus the new frames of this one. A difference of running
        # totals would keep the rounding error of a loud click forever. If there
        # are fewer new frames than span, as in a stream, of the past only the
        # frames that leave the span need a cumulative sum.
        if size < self.span:
            left = past[:, :, 1:size].flip(2).cumsum(2).flip(2)
            left = F.pad(left, (0, 1)) + past[:, :, size:].sum(2, keepdim=True)
            total = left + new.cumsum(2)
        else:
            spans = F.pad(known, (0, -size % self.span))
            spans = spans.unflatten(2, (-1, self.span))
            left = spans[:, :, :-1].flip(3).cumsum(3).flip(3)
            left = F.pad(left[..., 1:], (0, 1))
            total = left + spans[:, :, 1:].cumsum(3)
            total = total.flatten(2)[:, :, :size]
        mean, power = moments(total)
        variance = (power - mean.square()).clamp(min=0)
        scale = (variance + self.eps**2).rsqrt()
        out = (wide - mean[:, :, None]) * scale[:, :, None]
        return out.to(x.dtype) * self.weight + self.bias
