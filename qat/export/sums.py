"""SHA256SUMS: a line for each exported file, in the folder that it lies in, so that damage is found.

The int8 checkpoint holds a checksum of its own; other formats have no place for one that their engines would leave
alone. `sha256sum --check SHA256SUMS` reads the same lines, and `verify` is called by all that opens such a file here.
It guards against damage and mix-ups, and not against somebody who writes new sums. A file that no line names (one that
was copied alone, or comes from elsewhere) is not verified.
"""

import hashlib
import re
from pathlib import Path

NAME = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def sha256(path: Path) -> str:
    """The hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(folder: Path) -> dict[str, str]:
    """Path of a file, relative to `folder` -> its digest; nothing where there are no sums.

    Raises:
        ValueError: they cannot be read.
    """
    path = folder / NAME
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is damaged ({error}); export again") from error
    found = [LINE.fullmatch(line) for line in lines]
    if None in found:
        raise ValueError(f"'{path}' is damaged: line {found.index(None) + 1} is no SHA-256 and a name; export again")
    return {match[2]: match[1] for match in found if match is not None}


def text(sums: dict[str, str]) -> str:
    """The lines of the file, in order of names."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def of_folder(folder: Path) -> dict[str, str]:
    """The digests of all files in a folder, other folders in it included."""
    files = [path for path in folder.rglob("*") if path.is_file() and path != folder / NAME]
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def verify(path: str | Path) -> None:
    """Compare a file, or all of a folder, with the sums that were written with it.

    Raises:
        ValueError: it was edited or damaged; or a file of the folder is missing.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    for name, digest in read(folder).items():
        file = folder / name
        if folder != path and file != path:
            continue
        if not file.is_file():
            if folder == path:
                raise ValueError(f"'{path}' is not complete: '{name}' is missing, which {NAME} names; export again")
        elif sha256(file) != digest:
            raise ValueError(
                f"'{file}' was edited or damaged: its content does not match its line in '{folder / NAME}'; export "
                f"again (if you changed it on purpose, delete that line)"
            )
