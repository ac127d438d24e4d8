"""Notes as the events of the Music Transformer (arXiv 1809.04281), and MAESTRO as such events.

The 388 events are 128 note-ons, 128 note-offs, 100 time shifts (10 ms to 1 s) and 32 velocities of
the notes that follow (arXiv 1808.03715); two more tokens are the end of a piece and padding.
"""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.settings.readers.files import find_file
from benchmarks.settings.readers.midi import Note, read_notes
from influence_kit.errors import InvalidArgumentError

NOTE_OFFS, TIME_SHIFTS, VELOCITIES = 128, 256, 356  # where each kind begins; note-ons at 0
END, PADDING, TOKENS = 388, 389, 390
STEPS_A_SECOND = LONGEST_SHIFT = 100  # a step is 10 ms
VELOCITY_STEP = 4
COLUMNS = ("split", "midi_filename")


def encode_notes(notes: Iterable[Note]) -> list[int]:
    """The events of notes, without an end.

    Times are rounded to the 10 ms grid, each by itself, so that errors do not add up; a note lasts
    one step at least. Of one time, keys are released before others are pressed. A velocity is said
    where it changes.

    Example:
        >>> encode_notes([Note(0.0, 0.5, 60, 64), Note(0.5, 0.51, 62, 65)])
        [372, 60, 305, 188, 62, 256, 190]
    """
    events, now, loudness = [], 0, None
    for step, is_press, pitch, velocity in sorted(_presses_and_releases(notes)):
        while now < step:
            shift = min(step - now, LONGEST_SHIFT)
            events.append(TIME_SHIFTS + shift - 1)
            now += shift
        if is_press and velocity != loudness:
            events.append(VELOCITIES + velocity)
            loudness = velocity
        events.append(pitch if is_press else NOTE_OFFS + pitch)
    return events


def _presses_and_releases(notes: Iterable[Note]) -> Iterator[tuple[int, bool, int, int]]:
    """(step, is it a press, pitch, velocity in steps of 4), two a note."""
    for note in notes:
        start = round(note.start * STEPS_A_SECOND)
        end = max(round(note.end * STEPS_A_SECOND), start + 1)
        velocity = note.velocity // VELOCITY_STEP
        yield start, True, note.pitch, velocity
        yield end, False, note.pitch, velocity


def read_maestro(folder: Path, split: str) -> Iterator[tuple[str, list[int]]]:
    """Name and events of each piece of a split, an end after them, by the names of the files.

    Read are the table ``maestro-v3.0.0.csv`` (or that of another version) and the MIDI files that
    it names, in the folder or in ``maestro-v3.0.0`` below it.

    Raises:
        FileNotFoundError: where the table is missing, or a file that it names.
        InvalidArgumentError: where the table has no such split or not its columns.
    """
    table = find_file(
        folder, ["maestro-v3.0.0.csv", "maestro-v*.csv"], "MAESTRO's table", ["maestro-v*"]
    )
    for name in _pieces(table, split):
        path = table.parent / name
        if not path.is_file():
            raise FileNotFoundError(f"{table.name} names {name}, which is not in {table.parent}")
        yield name, [*encode_notes(read_notes(path)), END]


def _pieces(table: Path, split: str) -> Sequence[str]:
    with table.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (rows.fieldnames or [])]
        if missing:
            raise InvalidArgumentError(
                f"{table} has the columns {rows.fieldnames}; MAESTRO's table has {missing} too"
            )
        found = [(row["split"], row["midi_filename"]) for row in rows]
    names = sorted(name for own, name in found if own == split)
    if not names:
        splits = sorted({own for own, _ in found})
        raise InvalidArgumentError(f"{table} has no piece of the split '{split}'; it has {splits}")
    return names
