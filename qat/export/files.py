"""Files and folders that are either whole or not there, and exported ones with their checksums (`sums`)."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from qat.export import sums


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file beside `path` to write into; synced and renamed once the block ends without an error.

    Raises:
        OSError: the folder or the disk refuses; an earlier file is there still.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file, or leave what was there.

    Raises:
        OSError: the folder or the disk refuses.
    """
    with atomic_file(path) as file:
        file.write(content)


def write_export(path: Path, content: bytes) -> None:
    """As `write_atomically`, with a line in the folder's SHA256SUMS.

    Raises:
        OSError: the folder or the disk refuses.
        ValueError: the SHA256SUMS that is there cannot be read.
    """
    sums.read(path.parent)  # refuses before anything is written
    with atomic_file(path) as file:
        file.write(content)
        file.flush()
        _list(path, None)  # so that at no moment a line tells of another content
    _list(path, hashlib.sha256(content).hexdigest())


def _list(path: Path, digest: str | None) -> None:
    """Put a file into the SHA256SUMS beside it; with None, take it out."""
    known = sums.read(path.parent)
    listed = {name: line for name, line in known.items() if name != path.name}
    listed |= {} if digest is None else {path.name: digest}
    if listed != known:
        write_atomically(path.parent / sums.NAME, sums.text(listed).encode())


def replace(source: Path, path: Path) -> None:
    """Move a finished file or folder to `path`, on the same disk, in the place of what is there.

    A file takes its line of SHA256SUMS along.

    Raises:
        OSError: the folder refuses; what was there is there still.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_dir():
        _list(path, None)
        digest = sums.read(source.parent).get(source.name)
        os.replace(source, path)
        if digest is not None:
            _list(path, digest)
        return
    old = path.with_name(f".{path.name}.old")
    path.rename(old)
    try:
        source.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old)


@contextmanager
def replaced_folder(path: Path, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `path` once the block ends without an error.

    Files of the earlier folder that are not written anew stay. It survives any failure. All files are listed in the
    SHA256SUMS that is written with them.

    Args:
        path: of the folder.
        ours: whether a folder that is there, and not empty, may be replaced.

    Raises:
        ValueError: `path` is a file, or a folder that holds something else.
        OSError: the disk refuses.
    """
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or ours(path))):
        raise ValueError(f"'{path}' is there, and is no earlier export: name a new or an empty folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    old = new.with_name(f"{new.name}.old")
    try:
        yield new
        for file in path.iterdir() if path.exists() else ():
            if not (new / file.name).exists():
                shutil.copytree(file, new / file.name) if file.is_dir() else shutil.copy2(file, new / file.name)
        (new / sums.NAME).write_text(sums.text(sums.of_folder(new)), encoding="utf-8")
        for entry in [*new.rglob("*"), new]:
            _sync(entry)
        new.chmod(0o755)
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if old.exists():
        shutil.rmtree(old)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
