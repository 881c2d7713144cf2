"""Rotary positions: exact at any place, in the arithmetic of any device."""

import math

import pytest
import torch

from speechbrain_flashformer.nnet.rotary import RotaryAngles, rotate


def exact(length, head_width, offset):
    half = torch.arange(0, head_width, 2, dtype=torch.float64)
    place = torch.arange(length, dtype=torch.float64) + offset
    angles = place[:, None, None] * 10000.0 ** (-half / head_width)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], 2), torch.cat([-sin, sin], 2)


# The last is an hour of attention over every frame.
@pytest.mark.parametrize("offset", [0, 1000, 450_000, 3_600_000])
def test_angles_are_those_of_float64(offset):
    found = RotaryAngles(64)(500, offset)
    # Frequencies are rounded to 2^-41 of a turn per token.
    room = 1e-6 + 2 * math.tau * offset / 2**41
    for angles, truth in zip(found, exact(500, 64, offset)):
        assert angles.dtype == torch.float32
        torch.testing.assert_close(angles.double(), truth, rtol=0, atol=room)


@pytest.mark.parametrize("offset", [0, 450_000, 2**33, 2**55])
def test_what_a_stream_compares_is_relative_for_ever(offset):
    rotary = RotaryAngles(32)
    q, k = torch.randn(2, 1, 1, 1, 32).expand(2, 1, 300, 1, 32)

    def scores(angles):
        return torch.einsum(
            "bqhd,bkhd->qk", rotate(q, angles), rotate(k, angles)
        )

    late = scores(rotary(300, torch.tensor([offset])))
    torch.testing.assert_close(late, scores(rotary(300)), rtol=0, atol=2e-5)


def test_a_type_of_weights_changes_no_angle():
    rotary = RotaryAngles(16)
    expected = rotary(9)
    for half in (rotary.half(), rotary.bfloat16(), rotary.double()):
        assert all(map(torch.equal, half(9), expected))
    assert not rotary.state_dict()
