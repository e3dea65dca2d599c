"""Writing files so that a kill at any moment leaves the old artefact or the new one, never half of one.

New files are written beside their target, under a hidden name, and take its place by renaming. What a kill leaves over
is at most the hidden folder.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft.utils import CONFIG_NAME


@contextmanager
def new_folder(out: str | os.PathLike[str], *, marker: str, overwrite: bool) -> Iterator[Path]:
    """Give an empty folder to fill, which takes the place of `out` when the block ends without an error.

    Args:
        out (`str` or `os.PathLike`): The folder to write; its parents are made.
        marker (`str`): A file that tells that an existing folder holds what is being written: no other is replaced.
        overwrite (`bool`): Whether to replace a folder that exists.

    Raises:
        FileExistsError: If `out` exists and `overwrite` is False, or it has no such file.
    """
    target = _check_target(out, overwrite)
    if target.exists() and not (target / marker).is_file():
        raise FileExistsError(f"`{target}` exists and has no {marker}, so it is not replaced. Choose another folder.")
    with _scratch(target) as scratch:
        folder = scratch / target.name
        folder.mkdir()
        yield folder
        if target.exists():
            _exchange(folder, target)
        else:
            folder.rename(target)


@contextmanager
def new_file(out: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
    """Give a path to write to, which takes the place of `out` when the block ends without an error.

    Raises:
        FileExistsError: If `out` exists and `overwrite` is False, or it is a folder.
    """
    target = _check_target(out, overwrite)
    if target.is_dir():
        raise FileExistsError(f"`{target}` is a folder, so it is not replaced. Name a file.")
    with _scratch(target) as scratch:
        path = scratch / target.name
        yield path
        os.replace(path, target)


@contextmanager
def new_adapters(out: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty folder to save adapters to, whose files take their places in `out` when the block ends.

    Other files in `out` stay (a trainer keeps its own beside an adapter), so files are renamed one by one, weights
    before configs. While an adapter's settings stay what they are, as in all saves of one training, each moment shows
    the old adapter or the new one. Where they change, the old config goes first: a kill between these renames leaves a
    folder without a config, which nothing loads, rather than one adapter's weights under another's settings.
    """
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    with _scratch(target / "adapter") as scratch:  # inside the folder: its parent may be another disk
        yield scratch
        paths = sorted(path for path in scratch.rglob("*") if path.is_file() and path.name != CONFIG_NAME)
        for config in sorted(scratch.rglob(CONFIG_NAME)):
            old = target / config.relative_to(scratch)
            if old.is_file() and old.read_bytes() != config.read_bytes():
                old.unlink()
            paths.append(config)
        for path in paths:
            place = target / path.relative_to(scratch)
            place.parent.mkdir(exist_ok=True)
            os.replace(path, place)


def check_room(folder: str | os.PathLike[str], size: int) -> int:
    """Check that a disk has room.

    Args:
        folder (`str` or `os.PathLike`): Where to write; need not exist.
        size (`int`): Bytes to write.

    Returns:
        `int`: The free bytes.

    Raises:
        OSError: If there are fewer than `size`.
    """
    place = resolve(folder)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size:
        raise OSError(
            errno.ENOSPC,
            f"{size:,} bytes are to be written and the disk has {free:,} free. Free some or choose another folder",
            str(folder),
        )
    return free


def resolve(path: str | os.PathLike[str]) -> Path:
    """The absolute path, with `~` for the user's home."""
    return Path(path).expanduser().resolve()


def _check_target(out: str | os.PathLike[str], overwrite: bool) -> Path:
    target = resolve(out)
    if target.exists() and not overwrite:
        raise FileExistsError(f"`{target}` exists. Choose another name, or pass `overwrite=True` to replace it.")
    return target


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """A hidden folder beside the target, gone after the block with all that is still in it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _exchange(new: Path, old: Path) -> None:
    """Let two folders swap names: in one step where the system can (Linux, macOS), else in two renames."""
    if _exchange_at_once(new, old):
        return
    aside = new.with_name(f"{new.name}.old")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise


def _exchange_at_once(new: Path, old: Path) -> bool:
    # Python has no name for this; the calls return 0 where it was done, and change nothing where they cannot.
    paths = os.fsencode(new), os.fsencode(old)
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return False
    if hasattr(libc, "renameat2"):  # Linux
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return bool(libc.renameat2(here, paths[0], here, paths[1], exchange) == 0)
    if hasattr(libc, "renamex_np"):  # macOS
        swap = 2  # RENAME_SWAP
        return bool(libc.renamex_np(*paths, swap) == 0)
    return False
