"""Other shapes of the network, to be trained beside it and not used elsewhere.

Each takes the parts of a ``FlashFormer`` and goes through them in its own way,
offline and whole mixtures only.

Axes: B batch, N encoder channels, L frames, T tokens, C width, S speakers.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Variant(nn.Module):
    """The network as it is; what the others share.

    Arguments
    ---------
    masknet : FlashFormer
        Not causal; its parts are taken.
    """

    def __init__(self, masknet):
        super().__init__()
        self.masknet = masknet
        self.in_channels = masknet.in_channels

    @property
    def width(self):
        """C of the tokens."""
        return self.masknet.layers[0].norm_ffn.normalized_shape[0]

    def forward(self, mix_w):
        """Encoder output [B, N, L] to masks [S, B, N, L]."""
        x, skips = self.descend(mix_w)
        for layer in self.masknet.layers:
            x = self.think(layer, x)
        return self.ascend(x, skips)[..., : mix_w.shape[2]]

    def descend(self, mix_w):
        """Tokens [B, T, C], and what the way up adds."""
        net, skips = self.masknet, []
        x = net.project(net.norm_in(mix_w.transpose(1, 2)))
        x = F.pad(x, (0, 0, 0, -x.shape[1] % net.token_stride))
        for block, merge in zip(net.down, net.merge):
            skips.append(block(x))
            ratio = merge.in_features // x.shape[2]
            x = merge(skips[-1].unflatten(1, (-1, ratio)).flatten(2))
        return x, skips

    def think(self, layer, x):
        """One layer at the token rate."""
        return layer(x, self.masknet.rotary(x.shape[1]))

    def ascend(self, x, skips):
        """Masks [S, B, N, L] of tokens [B, T, C]."""
        net = self.masknet
        for i in reversed(range(len(skips))):
            ratio = net.split[i].out_features // skips[i].shape[2]
            x = net.split[i](x).unflatten(2, (ratio, -1)).flatten(1, 2)
            x = net.up[i](x + skips[i])
        return net._masks(x)


class OneMerge(Variant):
    """From frames to tokens in one step, not in steps of two."""

    def __init__(self, masknet):
        super().__init__(masknet)
        frame = masknet.project.out_features
        wide = frame * masknet.token_stride
        masknet.down, masknet.up = masknet.down[:1], masknet.up[:1]
        masknet.merge = nn.ModuleList([nn.Linear(wide, self.width)])
        masknet.split = nn.ModuleList([nn.Linear(self.width, wide)])


class EarlySplit(Variant):
    """One stream for each speaker from the middle of the layers on.

    The streams share all weights, and after each layer hear each other, token
    by token. Source: SepReformer (arXiv:2406.05983).
    """

    def __init__(self, masknet):
        super().__init__(masknet)
        self.early = len(masknet.layers) // 2
        late = len(masknet.layers) - self.early
        self.speakers, C = masknet.num_spks, self.width
        self.divide = nn.Linear(C, self.speakers * C)
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(late))
        heads = masknet.layers[0].attention.nhead
        self.across = nn.ModuleList(
            nn.MultiheadAttention(C, heads, batch_first=True)
            for _ in range(late)
        )
        # One mask from each stream.
        masknet.num_spks = 1
        width = masknet.masks.in_features
        masknet.masks = nn.Linear(width, masknet.in_channels)

    def forward(self, mix_w):
        """Encoder output [B, N, L] to masks [S, B, N, L]."""
        S, layers = self.speakers, self.masknet.layers
        x, skips = self.descend(mix_w)
        for layer in layers[: self.early]:
            x = self.think(layer, x)
        x = torch.cat(self.divide(x).chunk(S, dim=2))  # [S B, T, C]
        for layer, norm, across in zip(
            layers[self.early :], self.norms, self.across
        ):
            x = self.think(layer, x)
            # [S B, T, C] -> [B T, S, C]
            y = norm(x).unflatten(0, (S, -1)).permute(1, 2, 0, 3).flatten(0, 1)
            y = across(y, y, y, need_weights=False)[0]
            y = y.unflatten(0, (-1, x.shape[1])).permute(2, 0, 1, 3)
            x = x + y.flatten(0, 1)
        skips = [skip.repeat(S, 1, 1) for skip in skips]
        masks = self.ascend(x, skips)[0].unflatten(0, (S, -1))
        return masks[..., : mix_w.shape[2]]


class StageLosses(Variant):
    """In training, masks after every layer: the last ones first.

    The way up is the same for all, as in SepReformer and TISDiSS.
    """

    def forward(self, mix_w):
        """[B, N, L] to [S, B, N, L]; in training to [layers S, B, N, L]."""
        x, skips = self.descend(mix_w)
        stages = []
        for layer in self.masknet.layers:
            x = self.think(layer, x)
            stages.insert(0, x)
        if not self.training:
            stages = stages[:1]
        masks = torch.cat([self.ascend(x, skips) for x in stages])
        return masks[..., : mix_w.shape[2]]


VARIANTS = {
    "one-merge": OneMerge,
    "early-split": EarlySplit,
    "stage-losses": StageLosses,
}
