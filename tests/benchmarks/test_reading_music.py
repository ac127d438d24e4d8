"""MIDI files, notes as events, and MAESTRO: against times and events worked out by hand."""

import pytest
import torch
from small_files import midi, scale, tempo, track, variable_number, write_maestro

from benchmarks.settings.data import Sizes
from benchmarks.settings.readers.midi import Note, read_notes
from benchmarks.settings.readers.music import END, PADDING, encode_notes, read_maestro
from benchmarks.settings.sequences import maestro
from influence_kit.errors import InvalidArgumentError


@pytest.fixture
def notes_of(tmp_path):
    def read(content: bytes) -> list[Note]:
        path = tmp_path / "piece.midi"
        path.write_bytes(content)
        return read_notes(path)

    return read


def rounded(notes):
    return [(round(n.start, 9), round(n.end, 9), n.pitch, n.velocity) for n in notes]


def test_running_status_and_velocity_0(notes_of):
    events = track(
        (0, b"\x90\x3c\x40"),  # C4 on
        (480, b"\x3c\x00"),  # off, by running status and velocity 0
        (0, b"\x3e\x50"),  # D4 on
        (240, b"\x80\x3e\x40"),  # off, by its own status
    )
    # 480 ticks a quarter of half a second
    assert rounded(notes_of(midi(events, form=0))) == [(0, 0.5, 60, 64), (0.5, 0.75, 62, 80)]


def test_tempo_events_of_one_track_hold_for_all(notes_of):
    conductor = track((0, tempo(1_000_000)), (480, tempo(250_000)))
    piano = track((240, b"\x90\x3c\x40"), (480, b"\x80\x3c\x00"))
    # on after half a quarter of 1 s; off after another half of it and half a quarter of .25 s
    assert rounded(notes_of(midi(conductor, piano))) == [(0.5, 1.125, 60, 64)]


def test_film_frames_need_no_tempo(notes_of):
    events = track((0, tempo(1_000_000)), (50, b"\x90\x3c\x40"), (25, b"\x80\x3c\x00"))
    for code, frames in ((25, 25), (29, 30 / 1.001)):
        division = (256 - code) << 8 | 40  # frames a second, and 40 ticks a frame
        (note,) = notes_of(midi(events, division=division))
        assert note.start == pytest.approx(50 / 40 / frames)
        assert note.end == pytest.approx(75 / 40 / frames)


def test_other_events_are_skipped(notes_of):
    events = track(
        (0, b"\xff\x03\x05piano"),  # the track's name
        (0, b"\xf0\x03\x01\x02\xf7"),  # system exclusive
        (0, b"\xc0\x05"),  # program change: one data byte
        (0, b"\xd0\x11"),  # channel pressure: one data byte
        (0, b"\xe0\x00\x40"),  # pitch bend
        (0, b"\xb0\x07\x64"),  # volume
        (128, b"\x91\x3c\x40"),
        (352, b"\x81\x3c\x00"),
    )
    unknown = b"XFIH\x00\x00\x00\x02ab"
    content = midi(events, form=0)
    assert rounded(notes_of(content[:14] + unknown + content[14:])) == [
        (round(128 / 960, 9), 0.5, 60, 64)
    ]


def test_the_pedal_holds_notes_until_it_rises_or_they_are_struck_again(notes_of):
    events = track(
        (0, b"\xb0\x40\x7f"),  # pedal down
        (0, b"\x90\x3c\x40"),
        (0, b"\x3e\x40"),
        (480, b"\x3c\x00"),  # released, held by the pedal
        (480, b"\x3c\x50"),  # struck again
        (480, b"\x3c\x00"),
        (480, b"\xb0\x40\x3f"),  # pedal up
        (480, b"\x90\x3e\x00"),  # this key was down all the time
    )
    assert rounded(notes_of(midi(events))) == [
        (0, 1.0, 60, 64),
        (0, 2.5, 62, 64),
        (1.0, 2.0, 60, 80),
    ]


def test_channels_have_pedals_of_their_own(notes_of):
    events = track(
        (0, b"\xb1\x40\x7f"),
        (0, b"\x90\x3c\x40"),
        (0, b"\x91\x3c\x41"),
        (480, b"\x90\x3c\x00"),
        (0, b"\x91\x3c\x00"),
        (480, b"\xb1\x40\x00"),
    )
    assert rounded(notes_of(midi(events))) == [(0, 0.5, 60, 64), (0, 1.0, 60, 65)]


def test_a_note_without_an_end_lasts_until_the_last_event(notes_of):
    events = track((0, b"\x90\x3c\x40"), (480, b"\x3e\x40"), (480, b"\x3e\x00"))
    assert rounded(notes_of(midi(events)))[0] == (0, 1.0, 60, 64)


@pytest.mark.parametrize("value", [0, 0x7F, 0x80, 0x2000, 0x3FFF, 0x4000, 0x0FFFFFFF])
def test_delta_times_are_variable_length_numbers(notes_of, value):
    events = track((0, b"\x90\x3c\x40"), (value, b"\x3c\x00"))
    (note,) = notes_of(midi(events))
    assert note.end == pytest.approx(value / 960)
    assert len(variable_number(value)) <= 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"RIFF....", "starts with b'RIFF', not with b'MThd'"),
        (midi(track(), form=2), "of format 2, whose tracks do not sound together"),
        (midi(track(), division=0), "a quarter note has 0 ticks"),
        (midi(track(), division=0xE700), "a frame has 0 ticks"),
        (midi(track())[:-2], "ends 2 bytes early"),
        (midi(track()) + track(), "header says 1 tracks, and it has 2"),
        (midi(track((0, b"\x3c\x40"))), r"data byte \(60\) stands where an event has to start"),
        (midi(track((0, b"\x90\x3c\x40"), (0, b"\xff\x01\x00"), (0, b"\x3c\x00"))), "data byte"),
        (midi(track((0, b"\xf4"))), "status byte 0xf4 has no meaning"),
        (midi(track((0, b"\x90\x3c\x80"))), "data byte above 127"),
        (midi(b"MTrk\x00\x00\x00\x05\xff\xff\xff\xff\x00"), "more than four bytes"),
    ],
)
def test_damaged_files_are_refused(notes_of, content, message):
    with pytest.raises(InvalidArgumentError, match=f"piece.midi is no MIDI file .*{message}"):
        notes_of(content)


def decoded(events):
    """Notes in steps of 10 ms, by going through the events as the paper reads them."""
    now, velocity, sounding, notes = 0, None, {}, []
    for event in events:
        if event < 128:
            sounding[event] = now, velocity
        elif event < 256:
            start, loudness = sounding.pop(event - 128)
            notes.append((start, now, event - 128, loudness))
        elif event < 356:
            now += event - 255
        else:
            velocity = event - 356
    assert sounding == {}
    return sorted(notes)


def test_events_are_those_worked_out_by_hand():
    # 64 // 4 = 16: velocity 356 + 16; a shift of k steps is 255 + k
    notes = [Note(0.0, 0.5, 60, 64), Note(0.5, 3.0, 62, 65), Note(0.5, 0.5, 64, 127)]
    assert encode_notes(notes) == [
        *(372, 60),
        *(305, 188, 62, 387, 64),  # half a second: 50 steps
        *(256, 192),  # a note of no length lasts one step
        *(355, 355, 304, 190),  # 249 steps: 100 + 100 + 49
    ]


def test_events_decode_to_the_notes_on_the_grid():
    generator = torch.Generator().manual_seed(0)
    starts = torch.rand(60, generator=generator) * 20
    notes = [
        # of one pitch one after the other
        Note(float(start), float(start) + 0.05, pitch, 1 + 2 * pitch)
        for pitch, start in enumerate(starts.tolist(), 1)
    ]
    expected = []
    for note in notes:
        steps = round(note.start * 100), max(round(note.end * 100), round(note.start * 100) + 1)
        expected.append((*steps, note.pitch, note.velocity // 4))
    events = encode_notes(notes)
    assert decoded(events) == sorted(expected)
    assert max(events) < 388


def test_nothing_has_no_events():
    assert encode_notes([]) == []


def test_maestro_is_read_by_its_table(tmp_path):
    write_maestro(tmp_path, train=3, notes=5)
    pieces = dict(read_maestro(tmp_path, "train"))
    assert list(pieces) == [f"2018/train{i}.midi" for i in range(3)]
    # an eighth of 120 a minute is a quarter of a second: 25 steps
    start = [376, 41, 280, 169, 42, 280, 170]
    assert pieces["2018/train1.midi"][:7] == start
    assert pieces["2018/train1.midi"][-1] == END


@pytest.mark.parametrize("folder", ["maestro-v3.0.0", "maestro-v2.0.0"])
def test_maestro_is_found_as_it_is_unpacked(tmp_path, folder):
    (tmp_path / folder).mkdir()
    write_maestro(tmp_path / folder, notes=5)
    (tmp_path / folder / "maestro-v3.0.0.csv").rename(tmp_path / folder / f"{folder}.csv")
    assert len(list(read_maestro(tmp_path, "test"))) == 2


def test_examples_of_maestro_are_windows_of_events(tmp_path):
    write_maestro(tmp_path, train=3, test=2, notes=200)
    data = maestro(tmp_path, Sizes(3, 2))
    events = dict(read_maestro(tmp_path, "train"))["2018/train0.midi"]
    inputs, targets = data.train.tensors
    assert len(events) == 200 * 3 + 2  # on, shift and off of each; a velocity, the end
    assert inputs[:2].tolist() == [events[:256], events[256:512]]
    assert targets[:2].tolist() == [events[1:257], events[257:513]]
    # the rest of a piece is dropped, and pieces that are not needed are not read
    assert data.groups == ("2018/train0.midi", "2018/train0.midi", "2018/train1.midi")
    assert data.test_groups == ("2018/test0.midi", "2018/test1.midi")
    assert data.outputs == 390


def test_a_short_piece_is_padded(tmp_path):
    write_maestro(tmp_path, train=1, test=1, notes=5)
    data = maestro(tmp_path, Sizes())
    (events,) = dict(read_maestro(tmp_path, "train")).values()
    inputs, targets = (tensor[0].tolist() for tensor in data.train.tensors)
    rest = 256 - (len(events) - 1)
    assert inputs == events[:-1] + [PADDING] * rest
    assert targets == events[1:] + [-100] * rest


def test_a_missing_table_piece_or_column_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"MAESTRO's table: .* has no maestro-v3.0.0.csv"):
        list(read_maestro(tmp_path, "train"))
    write_maestro(tmp_path, notes=5)
    with pytest.raises(
        InvalidArgumentError, match=r"no piece of the split 'tests'; it has \['test'"
    ):
        list(read_maestro(tmp_path, "tests"))
    (tmp_path / "2018" / "train0.midi").unlink()
    with pytest.raises(FileNotFoundError, match=r"names 2018/train0.midi, which is not in"):
        list(read_maestro(tmp_path, "train"))
    (tmp_path / "maestro-v3.0.0.csv").write_text("composer,split\nBach,train\n")
    with pytest.raises(
        InvalidArgumentError, match=r"columns \['composer', 'split'\].*'midi_filename'"
    ):
        list(read_maestro(tmp_path, "train"))


def test_two_tables_are_one_too_many(tmp_path):
    for version in ("1.0.0", "2.0.0"):
        (tmp_path / f"maestro-v{version}.csv").write_text("split,midi_filename\n")
    with pytest.raises(InvalidArgumentError, match="holds several files of MAESTRO's table"):
        list(read_maestro(tmp_path, "train"))


def test_a_scale_has_its_notes(notes_of):
    assert [note.pitch for note in notes_of(scale(60, 4))] == [60, 61, 62, 63]
