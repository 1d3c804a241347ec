"""What a packet's own bytes say, where no encoder at hand writes such packets."""

from __future__ import annotations

import pytest

from vidi.inputs import codecs
from vidi.inputs.codecs import Look, Odd, Start

START = b"\0\0\0\1"
SLICE, SLICE_OF_A_HIGHER_LAYER = b"\x02\x01\x80", b"\x02\x02\x80"  # of a picture that others refer to


def test_hevc_between_start_codes_whatever_its_parameters_fill() -> None:
    """Only a record that begins with its version, 1, announces lengths in the place of start codes."""
    look = codecs.looker("hevc", START + bytes(40), "yuv420p")
    assert look(START + SLICE, False) == Look(Start.NO)


def test_one_slice_of_a_higher_temporal_layer_is_enough_to_refuse() -> None:
    look = codecs.looker("hevc", b"", "yuv420p")
    with pytest.raises(Odd, match="temporal layers"):
        look(START + SLICE + START + SLICE_OF_A_HIGHER_LAYER, False)


@pytest.mark.parametrize("profile", [0, 1, 2])
def test_vp9_of_profiles_that_are_read(profile: int) -> None:
    head = 2 << 6 | (profile & 1) << 5 | (profile >> 1) << 4
    assert codecs.looker("vp9", None, "yuv420p")(bytes([head | 1 << 1, 0]), True).start is Start.CLOSED


def test_vp9_of_profile_3_has_another_header() -> None:
    with pytest.raises(Odd, match="profile 3"):
        codecs.looker("vp9", None, "yuv420p")(bytes([2 << 6 | 3 << 4, 0]), True)
