"""Other shapes of the network, to be trained beside it and not used elsewhere.

Each is a ``FlashFormer`` that changes a step of the way through the U.

Axes: B batch, N encoder channels, L frames, T tokens, C width, S speakers.
"""

import torch
import torch.nn as nn

from speechbrain_flashformer import FlashFormer


class OneMerge(FlashFormer):
    """From frames to tokens in one step, not in steps of two."""

    def __init__(self, **numbers):
        super().__init__(**numbers)
        frame, token = self.project.out_features, self.split[-1].in_features
        wide = frame * self.token_stride
        self.down, self.up = self.down[:1], self.up[:1]
        self.ratio = self.token_stride
        self.merge = nn.ModuleList([nn.Linear(wide, token)])
        self.split = nn.ModuleList([nn.Linear(token, wide)])


class EarlySplit(FlashFormer):
    """One stream for each speaker from the middle of the layers on.

    The streams share all weights, and after each layer hear each other, token
    by token. Source: SepReformer (arXiv:2406.05983).
    """

    def __init__(self, num_spks=2, **numbers):
        # One mask from each stream.
        super().__init__(num_spks=1, **numbers)
        self.early = len(self.layers) // 2
        late = len(self.layers) - self.early
        self.speakers, C = num_spks, self.split[-1].in_features
        self.divide = nn.Linear(C, num_spks * C)
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(late))
        heads = self.layers[0].attention.nhead
        self.across = nn.ModuleList(
            nn.MultiheadAttention(C, heads, batch_first=True)
            for _ in range(late)
        )

    def attend(self, x, frames, context=None):
        """Tokens [B, T, C] to those of each speaker [S B, T, C]."""
        S = self.speakers
        positions, mask = self.place(x, frames)
        for layer in self.layers[: self.early]:
            x = self.run_layer(layer, x, positions, mask)
        x = torch.cat(self.divide(x).chunk(S, dim=2))
        if mask is not None:
            mask = mask.repeat(S, 1, 1)
        if positions.lengths is not None:
            positions = positions._replace(lengths=positions.lengths.repeat(S))
        for layer, norm, across in zip(
            self.layers[self.early :], self.norms, self.across
        ):
            x = self.run_layer(layer, x, positions, mask)
            # [S B, T, C] -> [B T, S, C]
            y = norm(x).unflatten(0, (S, -1)).permute(1, 2, 0, 3).flatten(0, 1)
            y = across(y, y, y, need_weights=False)[0]
            y = y.unflatten(0, (-1, x.shape[1])).permute(2, 0, 1, 3)
            x = x + y.flatten(0, 1)
        return x

    def ascend(self, x, skips, context=None):
        """Tokens [S B, T, C] to masks [S, B, N, L]."""
        S = self.speakers
        skips = [
            (
                skip.repeat(S, 1, 1),
                mask if mask is None else mask.repeat(S, 1, 1),
            )
            for skip, mask in skips
        ]
        return super().ascend(x, skips)[0].unflatten(0, (S, -1))


class StageLosses(FlashFormer):
    """In training, masks after every layer: the last ones first.

    The way up is the same for all, as in SepReformer and TISDiSS.
    """

    def attend(self, x, frames, context=None):
        """Tokens [B, T, C] to those after each layer, a list."""
        positions, mask = self.place(x, frames)
        stages = []
        for layer in self.layers:
            x = self.run_layer(layer, x, positions, mask)
            stages.insert(0, x)
        return stages if self.training else stages[:1]

    def ascend(self, stages, skips, context=None):
        """Masks [S, B, N, L]; in training [layers S, B, N, L]."""
        return torch.cat(
            [super(StageLosses, self).ascend(x, skips) for x in stages]
        )


VARIANTS = {
    "one-merge": OneMerge,
    "early-split": EarlySplit,
    "stage-losses": StageLosses,
}
