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


def _h264(*kinds: int) -> bytes:
    """NAL units of these types, each of the highest importance."""
    return b"".join(START + bytes([3 << 5 | kind, 1, 2, kind]) for kind in kinds)


def _hevc(*kinds: int, layer: int = 0) -> bytes:
    return b"".join(START + bytes([kind << 1 | layer >> 5, (layer & 31) << 3 | 1, 2, kind]) for kind in kinds)


@pytest.mark.parametrize(
    ("codec", "packet", "picture", "sets"),
    [("h264", _h264, 5, (7, 8, 13, 15)), ("hevc", _hevc, 19, (32, 33, 34)), ("hevc", _hevc, 21, (32, 33, 34))],
)
def test_decoding_starts_where_all_parameter_sets_are_sent_anew(codec, packet, picture, sets) -> None:
    """A set that was ever sent may be what the next pictures refer to: without it a cut would decode others, or nothing."""
    opens = Start.OPEN if picture == 21 else Start.CLOSED
    for left_out in sets:
        look = codecs.looker(codec, None, "yuv420p")
        assert look(packet(*sets, picture), True).start is opens
        assert look(packet(*(kind for kind in sets if kind != left_out), picture), True).start is Start.NO
        assert look(packet(*sets, picture), True).start is opens
    look = codecs.looker(codec, None, "yuv420p")
    assert look(packet(picture), True).start is opens  # none was ever sent in the packets


@pytest.mark.parametrize(("codec", "at", "kind"), [("h264", 4, 3 << 5 | 5), ("hevc", 21, 19 << 1)])
def test_the_size_of_lengths_stands_in_its_own_byte(codec: str, at: int, kind: int) -> None:
    """Lengths of one to four bytes, told by the byte of the record that holds it, whatever stands beside it."""
    unit = bytes([kind, 1, 2, 3])
    for size in (1, 2, 3, 4):
        record = bytearray([1, *[4 - size] * 24])
        record[at] = 0xFC | size - 1
        look = codecs.looker(codec, bytes(record), "yuv420p")
        assert look(len(unit).to_bytes(size, "big") + unit, True).start is Start.CLOSED


def test_a_record_too_short_for_the_size_of_lengths_announces_none() -> None:
    assert codecs.looker("h264", bytes([1, 100, 0, 31]), "yuv420p")(_h264(5), True).start is Start.CLOSED


def test_units_of_another_layer_are_not_the_pictures() -> None:
    look = codecs.looker("hevc", None, "yuv420p")
    assert look(_hevc(19) + _hevc(1, layer=1), True).start is Start.CLOSED
    assert look(_hevc(19) + _hevc(1, layer=33), True).start is Start.CLOSED
    assert look(_hevc(19) + _hevc(1), True).start is Start.NO


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(("existing", "inter", "shown"), [(0, 0, 1), (0, 0, 0), (0, 1, 1), (1, 0, 0), (1, 1, 1)])
def test_vp9_starts_at_key_frames_that_are_shown(existing: int, inter: int, shown: int, several: bool) -> None:
    """Of several frames in a packet the last is shown, whatever the first says of itself."""
    head = 2 << 6 | existing << 3 | inter << 2 | shown << 1
    look = codecs.looker("vp9", None, "yuv420p")(bytes([head, 0, 6 << 5 if several else 0]), True)
    assert (look.start is Start.CLOSED) == (not existing and not inter and bool(shown))
    assert look.shown == (several or bool(existing or shown))


def _obu(kind: int, content: bytes, *, extended: bool = False, long: bool = False) -> bytes:
    """A unit of AV1 with its size, in two bytes where one would do."""
    size = bytes([len(content) | 128, 0]) if long else bytes([len(content)])
    return bytes([kind << 3 | extended << 2 | 2]) + b"\x08" * extended + size + content


SHOWN_KEY, HIDDEN_KEY, SHOWN_INTER, SHOWN_AGAIN = b"\x10\0", b"\0\0", b"\x30\0", b"\x80\0"


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("frame", [3, 6])
def test_av1_starts_at_a_shown_key_frame_behind_its_sequence(frame: int, long: bool, extended: bool) -> None:
    def starts(*units: tuple[int, bytes]) -> bool:
        data = b"".join(_obu(kind, content, extended=extended, long=long) for kind, content in units)
        return codecs.looker("av1", None, "yuv420p")(data, True).start is Start.CLOSED

    delimiter, sequence = (2, b""), (1, bytes(range(11)))
    assert starts(delimiter, sequence, (frame, SHOWN_KEY))
    assert starts(sequence, (5, b"metadata"), (frame, SHOWN_KEY))
    assert not starts(delimiter, (frame, SHOWN_KEY))
    for other in (HIDDEN_KEY, SHOWN_INTER, SHOWN_AGAIN):
        assert not starts(delimiter, sequence, (frame, other))
        assert not starts(delimiter, sequence, (frame, other), (frame, SHOWN_KEY))
    assert not starts(delimiter, sequence)


def test_av1_units_of_200_bytes_take_two_for_their_size() -> None:
    metadata = bytes([5 << 3 | 2, 200 & 127 | 128, 200 >> 7]) + bytes(200)
    data = _obu(1, bytes(11)) + metadata + _obu(6, SHOWN_KEY)
    assert codecs.looker("av1", None, "yuv420p")(data, True).start is Start.CLOSED
    unsized = bytes([6 << 3]) + SHOWN_KEY  # the last unit of a packet may leave its size out
    assert codecs.looker("av1", None, "yuv420p")(_obu(1, bytes(11)) + unsized, True).start is Start.CLOSED
