"""A folder of tensors with a manifest, and the rule for which files belong to it.

Every folder that the library writes (stores of gradients, saved fits, traces of training, retrained
models, activations) follows these rules:

- A file is the folder's own if the manifest lists it, or if its header names the kind of folder and
  the file's name in it (under a checksum). No other file is ever replaced or removed.
- A folder with other files and without a manifest is refused.
- New contents are written under new names, the manifest is replaced last, and files of the old
  contents are removed after that: at every moment one of the two is complete.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from influence_kit.errors import InvalidArgumentError
from influence_kit.storage.atomic import is_temporary, remove_file, remove_temporaries
from influence_kit.storage.data_hash import hash_of
from influence_kit.storage.differences import LOSSES, NORMS, differences
from influence_kit.storage.locks import LOCK, alone_in
from influence_kit.storage.manifest import KINDS, MANIFEST, Manifest
from influence_kit.storage.tensor_files import (
    SUFFIX,
    PackedTensors,
    TensorFile,
    UnreadableFileError,
    is_own_file,
)

__all__ = [
    "LOSSES",
    "MANIFEST",
    "NORMS",
    "claim",
    "differences",
    "foreign_file",
    "hash_of",
    "read_folder",
    "read_listed",
    "removed_if_broken_off",
    "replace_contents",
    "write_folder",
    "write_listed",
    "write_own",
]
FIT, TENSORS = "fit", "tensors"
# how often to read again if another process replaces the contents meanwhile
TRIES = 5
SAVE_AGAIN = "save it again, in a new or empty folder"


def write_folder(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    description: Mapping[str, Any],
    kind: str = FIT,
) -> None:
    """Write tensors with a description; earlier contents of the same kind are replaced.

    Args:
        folder: a new or empty folder, or one with contents of the same kind.
        tensors: by name.
        description: what they belong to, in JSON types.
        kind: the kind of contents, a key of ``manifest.KINDS``.

    Raises:
        InvalidArgumentError: if the folder holds something else.
        StorageError: if the system refuses to write; the old contents are then unchanged.
    """
    path = Path(folder)
    with alone_in(path):
        listed = claim(path, kind)
        with removed_if_broken_off(path, kind):
            files = dict([write_listed(path, kind, TENSORS, tensors, listed)])
            replace_contents(path, Manifest(kind, description, files=files), listed)


def read_folder(
    folder: str | Path, description: Mapping[str, Any], kind: str = FIT
) -> dict[str, Tensor]:
    """The tensors of a folder, which must have the given description.

    Raises:
        InvalidArgumentError: if the folder does not exist, has another description (the message
            lists the differences), or is damaged.
    """
    path, tries = Path(folder), TRIES
    while True:
        try:
            return _tensors(path, description, kind)
        except FileNotFoundError as error:
            # another process may have saved again, and removed files that the manifest listed
            tries -= 1
            if not tries:
                raise InvalidArgumentError(f"{error}; {SAVE_AGAIN}") from error


def _tensors(folder: Path, description: Mapping[str, Any], kind: str) -> dict[str, Tensor]:
    """The same, or a ``FileNotFoundError`` if a file is missing."""
    manifest = Manifest.read(folder, kind, SAVE_AGAIN)
    found = differences(manifest.description, description)
    if found:
        raise InvalidArgumentError(
            f"{folder} was saved for something else: {'; '.join(found)}. Fit again, or use the "
            "model, data, loss and settings it was saved with"
        )
    tensors: dict[str, Tensor] = {}
    for name in manifest.files or ():
        tensors.update(read_listed(folder, manifest, name, SAVE_AGAIN))
    return tensors


# Contents that a manifest lists.


def write_listed(
    folder: Path, kind: str, stem: str, tensors: Mapping[str, Tensor], listed: Collection[str]
) -> tuple[str, dict[str, Any]]:
    """Write tensors to a file named after their checksum; returns its entry for the manifest.

    Args:
        folder: the folder.
        kind: its kind.
        stem: the beginning of the file name.
        tensors: the tensors, by name.
        listed: the files that the current manifest lists, which may be replaced.
    """
    packed = PackedTensors.of(tensors)
    name = f"{stem}-{packed.checksum.partition(':')[2][:16]}{SUFFIX}"
    write_own(folder / name, packed, kind, {}, listed)
    size = (folder / name).stat().st_size
    return name, {"size": size, "checksum": packed.checksum}


def read_listed(folder: Path, manifest: Manifest, name: str, remedy: str) -> dict[str, Tensor]:
    """The tensors of a file that a manifest lists, verified by its checksum.

    Raises:
        FileNotFoundError: if it is missing.
        InvalidArgumentError: if it is damaged, or another file.
    """
    path, entry = folder / name, (manifest.files or {})[name]
    try:
        file = TensorFile.open(path)
        expected = (True, entry["size"], entry["checksum"])
        if (file.is_named(manifest.kind), file.size, file.checksum) != expected:
            raise UnreadableFileError(f"it is not the file that {MANIFEST} lists")
        return file.tensors()
    except UnreadableFileError as error:
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there, and {MANIFEST} lists it") from error
        raise InvalidArgumentError(f"{path} cannot be read ({error}); {remedy}") from error


def replace_contents(folder: Path, manifest: Manifest, listed: Collection[str]) -> None:
    """Write a manifest whose files exist, and remove the files of the previous one.

    Args:
        folder: the folder; no other process may write to it.
        manifest: the new manifest.
        listed: the files of the previous one.
    """
    manifest.write(folder)
    _remove_all_but(folder, manifest, listed)


@contextmanager
def removed_if_broken_off(folder: Path, kind: str) -> Iterator[None]:
    """Inside, new contents are written; after an error or interrupt their files are removed."""
    try:
        yield
    except BaseException:
        with suppress(Exception):  # the first error is the one to report
            there = (folder / MANIFEST).exists()
            manifest = Manifest.read(folder, kind, "") if there else Manifest(kind, {})
            _remove_all_but(folder, manifest)
        raise


def _remove_all_but(folder: Path, manifest: Manifest, listed: Collection[str] = ()) -> None:
    """Remove the folder's own files that the manifest does not list."""
    kept = {*(manifest.files or ())}
    for path in folder.iterdir():
        if path.name in kept or not path.name.endswith(SUFFIX):
            continue
        if path.name in listed or is_own_file(path, manifest.kind):
            remove_file(path)
    remove_temporaries(folder)


# Which files are the folder's own.


def write_own(
    path: Path,
    packed: PackedTensors,
    kind: str,
    facts: Mapping[str, str],
    listed: Collection[str] = (),
) -> None:
    """Write a file of a folder, unless that would replace a file that is not the folder's own.

    Raises:
        InvalidArgumentError: if a file of that name exists that the library did not write.
    """
    there = path.exists() or path.is_symlink()
    if there and path.name not in listed and not is_own_file(path, kind):
        raise InvalidArgumentError(
            f"'{path}' is damaged, or influence_kit did not write it, and is not replaced: move or "
            "delete it"
        )
    packed.write(path, kind, facts)


def claim(folder: Path, kind: str) -> list[str]:
    """The files that the folder's manifest lists; none if the folder is new.

    Raises:
        InvalidArgumentError: if the folder holds something else.
    """
    path = folder / MANIFEST
    is_new = not (path.exists() or path.is_symlink())
    other = foreign_file(folder, kind) if is_new else None
    if other is not None and not path.exists():  # another process may have created it by now
        raise InvalidArgumentError(
            f"{folder} holds files ('{other}') and no {MANIFEST}: it is not {KINDS[kind]} of this "
            "version of influence_kit; name a new or empty folder"
        )
    if is_new and other is None:
        return []
    remedy = "delete the folder if nothing in it is needed, or name a new or empty one"
    return list(Manifest.read(folder, kind, remedy).files or ())


def foreign_file(folder: Path, kind: str) -> str | None:
    """The name of a file in the folder that is not the folder's own, if there is one."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    own = (
        name == LOCK
        or is_temporary(name)
        or (name.endswith(SUFFIX) and is_own_file(folder / name, kind))
        for name in names
    )
    return next((name for name, is_own in zip(names, own, strict=True) if not is_own), None)
