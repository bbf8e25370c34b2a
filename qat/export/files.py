"""Files and folders that are either whole or not there."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


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


def replace(source: Path, path: Path) -> None:
    """Move a finished file or folder to `path`, on the same disk, in the place of what is there.

    Raises:
        OSError: the folder refuses; what was there is there still.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_dir():
        os.replace(source, path)
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

    Files of the earlier folder that are not written anew stay. It survives any failure.

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
