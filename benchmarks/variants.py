"""Variants of the network, used only for comparisons in the benchmarks.

Other architectures, each a ``FlashFormer`` that changes one step of the forward
pass; ablations, which remove a part; other input norms.

Axes: B batch, N encoder channels, L frames, T tokens, C width, S speakers.
"""

import torch
import torch.nn as nn

from speechbrain_flashformer import FlashFormer
from speechbrain_flashformer.nnet.norm import CumulativeNorm, GlobalNorm


class OneMerge(FlashFormer):
    """Downsample frames to tokens in one step, instead of in steps of two."""

    def __init__(self, **numbers):
        super().__init__(**numbers)
        frame, token = self.project.out_features, self.split[-1].in_features
        wide = frame * self.token_stride
        self.down, self.up = self.down[:1], self.up[:1]
        self.ratio = self.token_stride
        self.merge = nn.ModuleList([nn.Linear(wide, token)])
        self.split = nn.ModuleList([nn.Linear(token, wide)])


class EarlySplit(FlashFormer):
    """Split into one branch per speaker in the middle of the layers.

    The branches share all weights. After each layer, or once at the split,
    attention across the branches exchanges information, token by token. Source:
    SepReformer (arXiv:2406.05983).
    """

    late = 0.5  # share of the layers after the split

    def __init__(self, num_spks=2, **numbers):
        # One mask per branch.
        super().__init__(num_spks=1, **numbers)
        late = round(self.late * len(self.layers))
        self.early = len(self.layers) - late
        self.speakers, C = num_spks, self.split[-1].in_features
        self.divide = nn.Linear(C, num_spks * C)
        times = max(late, 1)
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(times))
        heads = self.layers[0].attention.nhead
        self.across = nn.ModuleList(
            nn.MultiheadAttention(C, heads, batch_first=True)
            for _ in range(times)
        )

    def attend(self, x, mask, lengths, past):
        """Map tokens [B, T, C] to the tokens of each speaker [S B, T, C]."""
        S, positions = self.speakers, self.place(x, lengths)
        for layer in self.layers[: self.early]:
            x = self.run_layer(layer, x, positions, mask)
        x = torch.cat(self.divide(x).chunk(S, dim=2))
        if lengths is not None:
            mask = mask.repeat(S, 1, 1)
            positions = self.place(x, lengths.repeat(S))
        for i, (norm, across) in enumerate(zip(self.norms, self.across)):
            if self.early + i < len(self.layers):
                layer = self.layers[self.early + i]
                x = self.run_layer(layer, x, positions, mask)
            # [S B, T, C] -> [B T, S, C]
            y = norm(x).unflatten(0, (S, -1)).permute(1, 2, 0, 3).flatten(0, 1)
            y = across(y, y, y, need_weights=False)[0]
            y = y.unflatten(0, (-1, x.shape[1])).permute(2, 0, 1, 3)
            x = x + y.flatten(0, 1)
        return x

    def ascend(self, x, skips, past):
        """Map tokens [S B, T, C] to frames [S B, L, C]."""
        S = self.speakers
        skips = [
            (
                skip.repeat(S, 1, 1),
                mask if mask is None else mask.repeat(S, 1, 1),
            )
            for skip, mask in skips
        ]
        return super().ascend(x, skips, past)

    def head(self, x):
        """Map frames [S B, L, C] to masks [S, B, N, L]."""
        return super().head(x)[0].unflatten(0, (self.speakers, -1))


class LastSplit(EarlySplit):
    """Split into one branch per speaker after all layers."""

    late = 0


class StageLosses(FlashFormer):
    """In training, estimate masks after every layer, the last layer first.

    All stages share the upsampling, as in SepReformer and TISDiSS.
    """

    def attend(self, x, mask, lengths, past):
        """Map tokens [B, T, C] to a list of the tokens after each layer."""
        positions = self.place(x, lengths)
        stages = []
        for layer in self.layers:
            x = self.run_layer(layer, x, positions, mask)
            stages.insert(0, x)
        return stages if self.training else stages[:1]

    def ascend(self, stages, skips, past):
        """Return frames [B, L, C]; in training [layers B, L, C]."""
        return torch.cat(
            [super(StageLosses, self).ascend(x, [*skips], past) for x in stages]
        )

    def head(self, x):
        """Return masks [S, B, N, L]; in training [layers S, B, N, L]."""
        stages = len(self.layers) if self.training else 1
        masks = super().head(x).unflatten(1, (stages, -1))
        return masks.transpose(0, 1).flatten(0, 1)


VARIANTS = {
    "one-merge": OneMerge,
    "early-split": EarlySplit,
    "last-split": LastSplit,
    "stage-losses": StageLosses,
}


class Left(nn.Module):
    """Replaces a block: returns its input."""

    def forward(self, x, *_):
        """Return x."""
        return x


class NoUpdate(nn.Module):
    """Replaces attention: adds nothing to x."""

    window = (0, 0)  # a layer asks its attention for it

    def forward(self, x, *_):
        """Return zeros."""
        return torch.zeros_like(x)


class FrameNorm(nn.LayerNorm):
    """Replaces the global norm: normalizes each frame separately."""

    def reference(self, *_):
        """Return None: no statistics over other frames."""

    def forward(self, x, *_):
        """Normalize x [B, L, N]."""
        return super().forward(x)


class UniformNorm(GlobalNorm):
    """Replaces the global norm: gLN, where all frames have equal weight."""

    def reference(self, x, *_):
        """Mean and mean square [B] of x [B, L, N]."""
        return x.float().mean((1, 2)), x.float().square().mean((1, 2))


class EnergyNorm(GlobalNorm):
    """Replaces the global norm: frames are weighted by their energy."""

    def reference(self, x, *_):
        """Mean and mean square [B] of x [B, L, N]."""
        energy = x.float().square().mean(2)
        share = energy / energy.sum(1, keepdim=True).clamp(min=self.eps**2)
        mean = (share * x.float().mean(2)).sum(1)
        return mean, (share * energy).sum(1)


class PastNorm(CumulativeNorm):
    """Replaces the global norm: cumulative norm over all frames so far."""

    def __init__(self, channels):
        # 20 s of frames of tiny, longer than any input of the benchmark.
        super().__init__(channels, span=10000)


NORMS = {
    "frame": FrameNorm,
    "uniform": UniformNorm,
    "energy": EnergyNorm,
    "cumulative": PastNorm,
}


def _no_attention(masknet):
    for layer in masknet.layers:
        layer.attention = NoUpdate()
        layer.norm_attention = layer.scale_attention = nn.Identity()


def _no_token_fsmn(masknet):
    for layer in masknet.layers:
        layer.fsmn = Left()


def _no_token_memory(masknet):
    for layer in masknet.layers:
        layer.fsmn.memory = nn.ModuleList()


def _no_frame_fsmn(masknet):
    for blocks in (masknet.down, masknet.up):
        for i in range(len(blocks)):
            blocks[i] = Left()


def _no_frame_memory(masknet):
    for block in (*masknet.down, *masknet.up):
        block.memory = nn.ModuleList()


# Ablations: remove a whole gated FSMN block, or only its memory (gate and
# projections remain); at the token rate, or at all higher rates.
WITHOUT = {
    "attention": _no_attention,
    "token-fsmn": _no_token_fsmn,
    "token-memory": _no_token_memory,
    "frame-fsmn": _no_frame_fsmn,
    "frame-memory": _no_frame_memory,
}
