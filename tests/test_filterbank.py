"""Encoder and decoder that begin as a Fourier transform and back."""

import numpy as np
import pytest
import torch
from speechbrain.lobes.models import dual_path

from speechbrain_flashformer.nnet import filterbank

SIZES = [(32, 16), (64, 16), (128, 32), (132, 32), (256, 16), (20, 10)]


def pair(module, channels, kernel, **options):
    encoder = module.Encoder(kernel_size=kernel, out_channels=channels)
    decoder = module.Decoder(
        in_channels=channels,
        out_channels=1,
        kernel_size=kernel,
        stride=kernel // 2,
        **{"bias": False} | options,
    )
    return encoder, decoder


@pytest.mark.parametrize("channels, kernel", SIZES)
def test_the_start_gives_the_mixture_back_and_a_reset_does(
    channels, kernel, reset
):
    encoder, decoder = pair(filterbank, channels, kernel)
    mixture = torch.randn(2, 50 * kernel)
    inner = slice(kernel // 2, -(kernel // 2))

    def same():
        back, given = decoder(encoder(mixture))[:, inner], mixture[:, inner]
        return torch.allclose(back, given, atol=1e-5)

    assert same()
    with torch.no_grad():
        encoder.conv1d.weight.mul_(2)
    assert not same()
    reset(encoder)
    reset(decoder)
    assert same()


@pytest.mark.parametrize("channels, kernel", SIZES)
def test_frames_are_a_windowed_fourier_transform(channels, kernel):
    encoder, _ = pair(filterbank, channels, kernel)
    frame = torch.randn(1, kernel)
    with torch.no_grad():
        halves = encoder(frame)[0, :, 0].double().unflatten(0, (2, 2, -1))
    cosine, sine = halves[0] - halves[1]
    bins = np.arange(channels // 4) + 0.5
    angles = 2 * np.pi * np.outer(bins, np.arange(kernel)) / (channels // 2)
    window = torch.hann_window(kernel).sqrt().numpy()
    expected = abs(np.exp(-1j * angles) @ (frame[0].numpy() * window))
    expected /= np.sqrt(channels // 4)
    np.testing.assert_allclose(torch.hypot(cosine, sine), expected, atol=1e-5)


def test_weights_go_to_speechbrains_parts_and_back():
    ours = pair(filterbank, 64, 16)
    theirs = pair(dual_path, 64, 16)
    mixture = torch.randn(1, 800)
    for mine, their in zip(ours, theirs):
        mine.load_state_dict(their.state_dict())
    expected = theirs[1](theirs[0](mixture))
    torch.testing.assert_close(ours[1](ours[0](mixture)), expected)
    assert all(p.requires_grad for part in ours for p in part.parameters())


def test_a_bias_begins_at_zero():
    _, decoder = pair(filterbank, 64, 16, bias=True)
    assert torch.equal(decoder.bias, torch.zeros(1))


@pytest.mark.parametrize("channels, kernel", [(30, 10), (28, 16), (66, 32)])
def test_other_numbers_of_channels_are_one_clear_error(channels, kernel):
    needed = f"multiple of 4, at least {2 * kernel}; got {channels}"
    with pytest.raises(ValueError, match=needed):
        filterbank.Encoder(kernel_size=kernel, out_channels=channels)


def test_filters_that_frames_cannot_overlap_by_half_are_refused():
    with pytest.raises(ValueError, match="even number of samples, got 15"):
        filterbank.Encoder(kernel_size=15, out_channels=64)
