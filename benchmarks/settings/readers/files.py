"""Files of a data set: found where they are usually put, or said to be missing."""

from collections.abc import Sequence
from pathlib import Path

from influence_kit.errors import InvalidArgumentError


def find_file(folder: Path, names: Sequence[str], what: str, inside: Sequence[str] = ()) -> Path:
    """The first file there is of some names, in the folder or in one of its usual subfolders.

    Args:
        folder: the folder that the user named.
        names: the file's usual names, the preferred one first; they may be glob patterns.
        what: what the file holds, for the error.
        inside: subfolders into which the data set's archive unpacks, as names or patterns.

    Raises:
        FileNotFoundError: where there is none; with all names that were looked for.
        InvalidArgumentError: where several files fit one pattern.
    """
    folder = check_folder(folder)
    for place in (folder, *(path for name in inside for path in sorted(folder.glob(name)))):
        for name in names:
            found = sorted(place.glob(name))
            if len(found) > 1:
                raise InvalidArgumentError(
                    f"{place} holds several files of {what}: {[path.name for path in found]}; keep "
                    "one of them"
                )
            if found:
                return found[0]
    there = f" (or in {' or '.join(f'{name}/' for name in inside)})" if inside else ""
    raise FileNotFoundError(f"{what}: {folder} has no {' or '.join(names)}{there}")


def check_folder(folder: Path | None) -> Path:
    """The folder, which must be named and exist.

    Raises:
        FileNotFoundError: where there is no such folder.
        InvalidArgumentError: where none is named.
    """
    if folder is None:
        raise InvalidArgumentError(
            "this setting reads its data set's own files: name the folder that holds them"
        )
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    return Path(folder)
