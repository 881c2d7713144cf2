"""The one forward: no sample lost, padding unheard, SpeechBrain's own sum."""

import pytest
import torch
import torch.nn as nn
from speechbrain.lobes.models.dual_path import Decoder, Encoder

from speechbrain_flashformer import FlashFormer, build
from speechbrain_flashformer.nnet import pieces
from speechbrain_flashformer.nnet.separator import separate


@pytest.fixture
def model():
    torch.manual_seed(0)
    masknet = FlashFormer(
        in_channels=12,
        d_model=32,
        num_layers=1,
        nhead=2,
        d_frame=16,
        window=(3, 3),
    )
    encoder = Encoder(kernel_size=16, out_channels=12)
    decoder = Decoder(12, 1, kernel_size=16, stride=8, bias=False)
    return [part.eval() for part in (encoder, masknet, decoder)]


@pytest.mark.parametrize("T", [1, 15, 16, 17, 23, 24, 999])
@pytest.mark.parametrize("B", [1, 3])
def test_any_length_comes_back_whole(model, T, B):
    mixture = torch.randn(B, T)
    sources = separate(mixture, *model)
    assert sources.shape == (B, T, 2)
    assert sources.isfinite().all()


def test_equals_the_recipes_forward_where_that_loses_nothing(model):
    encoder, masknet, decoder = model
    mixture = torch.randn(2, 16 + 8 * 40)
    mix_w = encoder(mixture)
    sep_h = torch.stack([mix_w] * 2) * masknet(mix_w)
    expected = torch.stack([decoder(sep_h[i]) for i in range(2)], dim=-1)
    torch.testing.assert_close(separate(mixture, *model), expected)


def test_the_last_samples_are_heard(model):
    mixture = torch.zeros(1, 16 + 8 * 5 + 3)
    mixture[0, -1] = 1.0
    quiet = separate(torch.zeros_like(mixture), *model)
    assert not torch.equal(separate(mixture, *model), quiet)


def test_a_row_alone_equals_the_same_row_in_a_padded_batch(model):
    # 504 / 997 * 997 is less than 504 in float32, and so of 63.
    samples = torch.tensor([997, 504, 63, 9])
    mixture = torch.randn(4, 997)  # noise where the padding is
    sources = separate(mixture, *model, lengths=samples / 997)
    for b, n in enumerate(samples):
        alone = separate(mixture[b : b + 1, :n], *model)
        torch.testing.assert_close(
            sources[b : b + 1, :n], alone, atol=1e-5, rtol=1e-4
        )
        assert not sources[b, n:].any()


def test_masknets_without_lengths_serve_too():
    encoder = Encoder(kernel_size=16, out_channels=12)
    decoder = Decoder(12, 1, kernel_size=16, stride=8, bias=False)

    class Shares(nn.Module):
        def forward(self, mix_w):
            return torch.stack([0.25 * torch.ones_like(mix_w)] * 2 + [mix_w])

    mixture = torch.randn(2, 16 + 8 * 10)
    sources = separate(mixture, encoder, Shares(), decoder)
    mix_w = encoder(mixture)
    for s, masked in enumerate((mix_w / 4, mix_w / 4, mix_w.square())):
        torch.testing.assert_close(sources[..., s], decoder(masked))


@torch.no_grad()
def test_wrappers_hand_on_lengths(model):
    """Such as those of adapters, which take whatever they are given."""

    class Wrapper(torch.nn.Module):
        def __init__(self, masknet):
            super().__init__()
            self.masknet = masknet

        def forward(self, *args, **kwargs):
            return self.masknet(*args, **kwargs)

    encoder, masknet, decoder = model
    mixture, lengths = torch.randn(2, 1000), torch.tensor([1.0, 0.5])
    expected = separate(mixture, encoder, masknet, decoder, lengths)
    wrapped = separate(mixture, encoder, Wrapper(masknet), decoder, lengths)
    torch.testing.assert_close(wrapped, expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, [1.0, 0.6]])
def test_pieces_give_what_the_whole_gives(monkeypatch, causal, lengths):
    """Without gradients; no more masks exist at once than a piece has."""
    separator = build("tiny", num_layers=2, causal=causal, window=(9, 9)).eval()
    masknet, sizes = separator.masknet, []
    masknet.masks.register_forward_hook(
        lambda _, given, out: sizes.append(out.shape[1])
    )
    lengths = None if lengths is None else torch.tensor(lengths)
    mixture = torch.randn(2, 5003)
    parts = separator.encoder, masknet, separator.decoder
    whole = separate(mixture, *parts, lengths).detach()
    monkeypatch.setattr(pieces, "PIECE", 50)
    sizes.clear()
    with torch.no_grad():
        found = separate(mixture, *parts, lengths)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-4)
    assert max(sizes) == 50 and sum(sizes) == 312


def test_what_pieces_share_has_its_bias_once(model, monkeypatch):
    encoder, masknet, _ = model
    decoder = Decoder(12, 1, kernel_size=16, stride=8, bias=True)
    mixture = torch.randn(1, 5000)
    whole = separate(mixture, encoder, masknet, decoder).detach()
    monkeypatch.setattr(pieces, "PIECE", 50)
    with torch.no_grad():
        found = separate(mixture, encoder, masknet, decoder)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("around", [torch.nn.DataParallel, torch.nn.Sequential])
def test_what_is_around_a_masknet_gets_all_masks(model, monkeypatch, around):
    encoder, masknet, decoder = model
    mixture = torch.randn(1, 5000)
    whole = separate(mixture, encoder, masknet, decoder)
    monkeypatch.setattr(pieces, "PIECE", 50)
    found = separate(mixture, encoder, around(masknet), decoder)
    torch.testing.assert_close(found, whole)


@torch.no_grad()
def test_a_hook_sees_all_masks(model, monkeypatch):
    encoder, masknet, decoder = model
    monkeypatch.setattr(pieces, "PIECE", 50)
    masknet.register_forward_hook(lambda _, given, masks: 0 * masks)
    sources = separate(torch.randn(1, 5000), encoder, masknet, decoder)
    assert (sources == 0).all()


@torch.no_grad()
def test_pieces_are_of_the_type_of_the_whole(model, monkeypatch):
    mixture = torch.randn(1, 5000)
    with torch.autocast("cpu", torch.bfloat16):
        whole = separate(mixture, *model)
        monkeypatch.setattr(pieces, "PIECE", 50)
        found = separate(mixture, *model)
    assert found.dtype == whole.dtype
    torch.testing.assert_close(found, whole, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_a_network_that_compiles_itself_gives_one_piece(model, monkeypatch):
    encoder, masknet, decoder = model
    mixture = torch.randn(1, 5000)
    whole = separate(mixture, encoder, masknet, decoder)
    monkeypatch.setattr(pieces, "PIECE", 50)
    masknet.compile(backend="eager")
    found = separate(mixture, encoder, masknet, decoder)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-4)
