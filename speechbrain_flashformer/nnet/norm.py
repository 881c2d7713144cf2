"""Norms of the input, in which frames count by their amplitude.

One mean and one variance for all channels of many frames keep the differences
in level between frames, which a norm per frame would hide. In Conv-TasNet's gLN
(arXiv:1809.07454, eq. 9 to 11) all frames count alike, and speech is the louder
to the network the more silence there is around it. Here silence changes
nothing. Energies in place of amplitudes would do that too, but let one click
decide for the whole recording.

Axes: B batch, L frames, N channels.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

# Floor of the denominator, so that digital silence and its gradient stay
# finite. Far below one frame of the least standard deviation.
FLOOR = 1e-20


def weighted_sums(x, mask=None):
    """What mean and mean square of frames weighted by amplitude are made of.

    Arguments
    ---------
    x : torch.Tensor
        [B, L, N], in single precision at least: half would overflow.
    mask : torch.Tensor, optional
        [B, L, 1], 0 at padded frames.

    Returns
    -------
    torch.Tensor
        [B, 3, L]: for each frame its root mean square over the channels times
        its mean, times its mean square, and alone. The sums of the first two
        over any frames, over the sum of the third, are mean and mean square.

    Example
    -------
    >>> x = torch.tensor([[[1.0, 7.0], [0.0, 0.0]]])  # second frame: silence
    >>> weighted_sums(x)
    tensor([[[ 20.,   0.],
             [125.,   0.],
             [  5.,   0.]]])
    """
    # One pass over the channels; the squares would be kept for the gradient.
    amplitude = torch.linalg.vector_norm(x, dim=2) / x.shape[2] ** 0.5
    weight = amplitude if mask is None else amplitude * mask.squeeze(2)
    sums = [weight * x.mean(2), weight * amplitude.square(), weight]
    return torch.stack(sums, 1)


def moments(sums):
    """Mean and mean square of ``weighted_sums``.

    Arguments
    ---------
    sums : torch.Tensor
        [B, 3, ...], summed over frames.

    Returns
    -------
    tuple of torch.Tensor
        [B, ...] each; 0 where there was only silence.

    Example
    -------
    >>> x = torch.tensor([[[1.0, 7.0], [0.0, 0.0]]])
    >>> mean, power = moments(weighted_sums(x).sum(2))
    >>> mean.item(), power.item()
    (4.0, 25.0)
    """
    return (sums[:, :2] / sums[:, 2:].clamp(min=FLOOR)).unbind(1)


def _wide(x):
    """In single precision at least: half would overflow in the squares."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class GlobalNorm(nn.Module):
    """Norm over all channels and valid frames of a recording.

    Arguments
    ---------
    channels : int
        N.
    eps : float
        Least standard deviation: silence stays finite. So small that the
        level of a recording makes no difference.

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
        """What frames are normalised by.

        Arguments
        ---------
        x : torch.Tensor
            [B, L, N], all frames of recordings.
        mask : torch.Tensor, optional
            [B, L, 1], 0 at padded frames.

        Returns
        -------
        tuple of torch.Tensor
            Mean and mean square, [B] each.
        """
        return moments(weighted_sums(_wide(x), mask).sum(2))

    def forward(self, x, given=None):
        """Normalise the frames of recordings.

        Arguments
        ---------
        x : torch.Tensor
            [B, L, N].
        given : tuple of torch.Tensor, optional
            The ``reference`` of the recordings that x are parts of; by default
            that of x.

        Returns
        -------
        torch.Tensor
            [B, L, N].
        """
        wide = _wide(x)
        mean, power = (s.to(wide) for s in given or self.reference(x))
        variance = (power - mean.square()).clamp(min=0)
        scale = (variance + self.eps**2).rsqrt()
        # One pass over the frames, which are many: gain * x + shift.
        gain = scale[:, None, None] * self.weight
        shift = self.bias - mean[:, None, None] * gain
        return torch.addcmul(shift, wide, gain).to(x.dtype)


class CumulativeNorm(GlobalNorm):
    """``GlobalNorm`` over the past: at each frame, over the last ``span``.

    Weights are those of ``GlobalNorm``. A span that ends forgets: a loud word
    does not quieten the hour after it.

    Arguments
    ---------
    channels : int
        N.
    span : int
        Frames.

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
        """The past of new streams, ``weighted_sums`` of silence.

        like is any tensor [B, ...] of the streams' dtype and device.
        """
        wide = torch.promote_types(like.dtype, torch.float32)
        return {"sums": like.new_zeros(len(like), 3, self.span, dtype=wide)}

    def reference(self, x, mask=None):
        """The past of frames x: silence. Padding comes after all that count."""
        return self.make_streaming_context(x)

    def forward(self, x, context=None):
        """Normalise frames by those before them.

        Arguments
        ---------
        x : torch.Tensor
            [B, L, N].
        context : dict, optional
            Of a stream whose next frames x are; changed.

        Returns
        -------
        torch.Tensor
            [B, L, N].
        """
        context = context or self.reference(x)
        past = context["sums"]
        wide = x.to(past.dtype)
        known = torch.cat([past, weighted_sums(wide)], 2)
        context["sums"] = known[:, :, x.shape[1] :]
        # Span by span: what is left of the span before, and what is new. No
        # difference of running totals, in which a click would never be over.
        spans = F.pad(known, (0, -x.shape[1] % self.span))
        spans = spans.unflatten(2, (-1, self.span))
        left = spans[:, :, :-1].flip(3).cumsum(3).flip(3)
        left = F.pad(left[..., 1:], (0, 1))
        total = left + spans[:, :, 1:].cumsum(3)
        total = total.flatten(2)[:, :, : x.shape[1]]
        mean, power = moments(total)
        variance = (power - mean.square()).clamp(min=0)
        scale = (variance + self.eps**2).rsqrt()
        out = (wide - mean[:, :, None]) * scale[:, :, None]
        return out.to(x.dtype) * self.weight + self.bias
