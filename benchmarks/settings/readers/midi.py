"""Standard MIDI files (.mid): the notes of all tracks and the sustain pedal, in seconds.

A file is a header chunk and track chunks; a track is a list of (delta time, event). Delta times are
variable-length numbers of ticks. An event that leaves its status byte out has that of the event
before it (running status). Ticks become seconds by the tempo events of all tracks together.
(MIDI 1.0, "Standard MIDI Files", 1996.)
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from influence_kit.errors import InvalidArgumentError

NOTE_OFF, NOTE_ON, CONTROL = 0x80, 0x90, 0xB0
SUSTAIN, PEDAL_DOWN = 64, 64  # the controller's number, and the value from which it is down
META, TEMPO, END_OF_TRACK = 0xFF, 0x51, 0x2F
SYSTEM_EXCLUSIVE = (0xF0, 0xF7)
ONE_DATA_BYTE = (0xC0, 0xD0)  # program change, channel pressure
MICROSECONDS_A_QUARTER = 500_000  # until the first tempo event
DROP_FRAME, DROP_FRAMES = 29, 30 / 1.001  # the code of 29.97 frames a second


class Event(NamedTuple):
    """A channel message or a tempo event.

    Attributes:
        tick: when, from the start of the file.
        kind: ``NOTE_OFF``, ``NOTE_ON``, ``CONTROL`` or ``TEMPO``.
        channel: 0 to 15; 0 for a tempo.
        number: the pitch, the controller, or the microseconds a quarter note.
        value: the velocity or the controller's value.
    """

    tick: int
    kind: int
    channel: int
    number: int
    value: int


class Note(NamedTuple):
    """A note: seconds from ``start`` to ``end``, pitch 0 to 127, velocity 1 to 127."""

    start: float
    end: float
    pitch: int
    velocity: int


def read_notes(path: Path) -> list[Note]:
    """The notes of a MIDI file by their starts, held as long as the sustain pedal holds them.

    Raises:
        InvalidArgumentError: for a file that is no MIDI file, or is damaged, or is of format 2.
    """
    try:
        division, tracks = _read_tracks(path.read_bytes())
        events = [event for track in tracks for event in _read_events(track)]
        tick_length = _fixed_tick(division)
    except MidiError as error:
        raise InvalidArgumentError(f"{path} is no MIDI file that can be read: {error}") from error
    events.sort(key=lambda event: event.tick)  # of one tick, in the order of the tracks
    keyboard = _Keyboard()
    for time, event in _in_seconds(events, tick_length, division):
        keyboard.play(time, event)
    return keyboard.finished()


class MidiError(ValueError):
    """What is wrong with the bytes of a file."""


@dataclass
class _Bytes:
    """A place in a string of bytes, which reading moves on."""

    content: bytes
    place: int = 0

    def take(self, count: int) -> bytes:
        taken = self.content[self.place : self.place + count]
        if len(taken) < count:
            raise MidiError(f"it ends {count - len(taken)} bytes early")
        self.place += count
        return taken

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "big")

    def variable_number(self) -> int:
        """Seven bits a byte, the high bit set on all but the last; four bytes at most."""
        value = 0
        for _ in range(4):
            byte = self.number(1)
            value = value << 7 | byte & 0x7F
            if byte < 0x80:
                return value
        raise MidiError("a variable-length number has more than four bytes")

    @property
    def is_at_end(self) -> bool:
        return self.place >= len(self.content)


def _read_tracks(content: bytes) -> tuple[int, list[bytes]]:
    """The header's division, and the content of each track chunk."""
    data, tracks = _Bytes(content), []
    if content[:4] != b"MThd":
        raise MidiError(f"it starts with {content[:4]!r}, not with b'MThd'")
    data.take(4)
    header = _Bytes(data.take(data.number(4)))
    form, count, division = header.number(2), header.number(2), header.number(2)
    if form > 1:
        raise MidiError(f"it is of format {form}, whose tracks do not sound together")
    if division == 0:
        raise MidiError("its header says that a quarter note has 0 ticks")
    while not data.is_at_end:
        kind, body = data.take(4), data.take(data.number(4))
        if kind == b"MTrk":  # chunks of other kinds are to be skipped
            tracks.append(body)
    if len(tracks) != count:
        raise MidiError(f"its header says {count} tracks, and it has {len(tracks)}")
    return division, tracks


def _read_events(track: bytes) -> Iterator[Event]:
    """The events of a track that matter, in order."""
    data, tick, running = _Bytes(track), 0, None
    while not data.is_at_end:
        tick += data.variable_number()
        status = data.number(1)
        if status < 0x80:  # a data byte: the status is that of the event before
            if running is None:
                raise MidiError(f"a data byte ({status}) stands where an event has to start")
            data.place -= 1
            status = running
        if status == META:
            kind, body = data.number(1), data.take(data.variable_number())
            if kind == END_OF_TRACK:
                return
            if kind == TEMPO:
                yield Event(tick, TEMPO, 0, int.from_bytes(body, "big"), 0)
            running = None
        elif status in SYSTEM_EXCLUSIVE:
            data.take(data.variable_number())
            running = None
        elif status < 0xF0:
            running = status
            yield from _channel_message(tick, status, data)
        else:
            raise MidiError(f"the status byte {status:#x} has no meaning in a file")


def _channel_message(tick: int, status: int, data: _Bytes) -> Iterator[Event]:
    kind, channel = status & 0xF0, status & 0x0F
    number = data.number(1)
    value = 0 if kind in ONE_DATA_BYTE else data.number(1)
    if max(number, value) > 0x7F:
        raise MidiError(f"an event {status:#x} has a data byte above 127")
    if kind == NOTE_ON and value == 0:  # how running status ends notes
        kind = NOTE_OFF
    if kind in (NOTE_ON, NOTE_OFF) or (kind, number) == (CONTROL, SUSTAIN):
        yield Event(tick, kind, channel, number, value)


def _fixed_tick(division: int) -> float | None:
    """The seconds of a tick where the header counts in film frames; None where tempo rules."""
    if division & 0x8000 == 0:
        return None
    code, ticks = 0x100 - (division >> 8), division & 0xFF
    frames = DROP_FRAMES if code == DROP_FRAME else code
    if ticks == 0:
        raise MidiError("its header says that a frame has 0 ticks")
    return 1 / (frames * ticks)


def _in_seconds(
    events: list[Event], fixed: float | None, division: int
) -> Iterator[tuple[float, Event]]:
    """The events, which are in order, with their times; tempo events are used up."""
    seconds, tick = 0.0, 0
    tick_length = fixed or MICROSECONDS_A_QUARTER / division / 1e6
    for event in events:
        seconds += (event.tick - tick) * tick_length
        tick = event.tick
        if event.kind != TEMPO:
            yield seconds, event
        elif fixed is None:
            tick_length = event.number / division / 1e6


Key = tuple[int, int]  # channel and pitch


@dataclass
class _Keyboard:
    """Notes from presses and releases of keys and pedal.

    A key released while the pedal is down sounds on until the pedal rises, or until it is pressed
    again. A note that nothing ends lasts until the last event.
    """

    notes: list[Note] = field(default_factory=list)
    sounding: dict[Key, tuple[float, int]] = field(default_factory=dict)  # start and velocity
    held: set[Key] = field(default_factory=set)  # released, and held by the pedal
    pedals: set[int] = field(default_factory=set)  # channels whose pedal is down
    time: float = 0.0

    def play(self, time: float, event: Event) -> None:
        self.time, key = time, (event.channel, event.number)
        if event.kind == NOTE_ON:
            self._end(key)
            self.sounding[key] = time, event.value
        elif event.kind == NOTE_OFF:
            if event.channel in self.pedals:
                self.held.add(key)
            else:
                self._end(key)
        elif event.value >= PEDAL_DOWN:
            self.pedals.add(event.channel)
        else:
            self.pedals.discard(event.channel)
            for own in [key for key in self.held if key[0] == event.channel]:
                self._end(own)

    def finished(self) -> list[Note]:
        """All notes, by start and pitch."""
        for key in list(self.sounding):
            self._end(key)
        return sorted(self.notes, key=lambda note: (note.start, note.pitch, note.end))

    def _end(self, key: Key) -> None:
        self.held.discard(key)
        if key in self.sounding:
            start, velocity = self.sounding.pop(key)
            self.notes.append(Note(start, self.time, key[1], velocity))
