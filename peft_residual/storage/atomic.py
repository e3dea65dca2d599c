"""Atomic writes: a process killed at any moment leaves the old file or folder, or the new one, never a part of it.

New files are written to a hidden folder beside the target and then take its place by renaming. A killed process can
leave that hidden folder behind, nothing else.
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
def new_folder(target: str | os.PathLike[str], *, marker: str, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder to fill. It replaces `target` when the block ends without an error.

    Args:
        target (`str` or `os.PathLike`): The folder to write. Missing parents are created.
        marker (`str`): Name of a file that every folder of this kind contains. A folder without it is not replaced.
        overwrite (`bool`): Whether to replace an existing folder.

    Raises:
        FileExistsError: If `target` exists, and `overwrite` is False or `target` does not contain `marker`.
    """
    target = _check_target(target, overwrite)
    if target.exists() and not (target / marker).is_file():
        raise FileExistsError(f"`{target}` exists and has no {marker}, so it is not replaced. Choose another folder.")
    with _scratch_folder(target) as scratch:
        folder = scratch / target.name
        folder.mkdir()
        yield folder
        if target.exists():
            _exchange(folder, target)
        else:
            folder.rename(target)


@contextmanager
def new_file(target: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
    """Yield a path to write to. That file replaces `target` when the block ends without an error.

    Raises:
        FileExistsError: If `target` exists and `overwrite` is False, or if `target` is a folder.
    """
    target = _check_target(target, overwrite)
    if target.is_dir():
        raise FileExistsError(f"`{target}` is a folder, so it is not replaced. Choose a file name.")
    with _scratch_folder(target) as scratch:
        yield scratch / target.name
        os.replace(scratch / target.name, target)


@contextmanager
def new_adapters(save_directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder to save adapters to. When the block ends, its files move to `save_directory`.

    Other files in `save_directory` stay: a trainer keeps its own files beside an adapter. Therefore files are renamed
    one by one, weights before configs. As long as an adapter's config does not change, as in all saves of one training
    run, the folder holds the old adapter or the new one at every moment. If a config changes, the old one is deleted
    first: a process killed during the renames then leaves a folder without a config, which cannot be loaded, and not
    weights that do not belong to the config.
    """
    target = Path(save_directory)
    target.mkdir(parents=True, exist_ok=True)
    with _scratch_folder(target / "adapter") as scratch:  # inside the folder: its parent may be on another disk
        yield scratch
        weights = sorted(path for path in scratch.rglob("*") if path.is_file() and path.name != CONFIG_NAME)
        configs = sorted(scratch.rglob(CONFIG_NAME))
        for config in configs:
            old = target / config.relative_to(scratch)
            if old.is_file() and old.read_bytes() != config.read_bytes():
                old.unlink()
        for path in [*weights, *configs]:
            place = target / path.relative_to(scratch)
            place.parent.mkdir(exist_ok=True)
            # A rename over a file makes some systems wait for the disk: an unchanged card or config stays.
            if path.suffix == ".safetensors" or not place.is_file() or place.read_bytes() != path.read_bytes():
                os.replace(path, place)


def check_room(folder: str | os.PathLike[str], size: int) -> int:
    """Check that a disk has enough free space.

    Args:
        folder (`str` or `os.PathLike`): Where to write. It does not need to exist.
        size (`int`): Number of bytes to write.

    Returns:
        `int`: The number of free bytes.

    Raises:
        OSError: If fewer than `size` bytes are free.
    """
    path = resolve(folder)
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        message = f"{size:,} bytes are to be written and the disk has {free:,} free. Free space or use another folder"
        raise OSError(errno.ENOSPC, message, str(folder))
    return free


def resolve(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path, with `~` expanded to the user's home."""
    return Path(path).expanduser().resolve()


def _check_target(target: str | os.PathLike[str], overwrite: bool) -> Path:
    path = resolve(target)
    if path.exists() and not overwrite:
        raise FileExistsError(f"`{path}` exists. Choose another name, or pass `overwrite=True` to replace it.")
    return path


@contextmanager
def _scratch_folder(target: Path) -> Iterator[Path]:
    """Create a hidden folder beside the target. It is deleted after the block, with everything left in it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True) as path:
        yield Path(path)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders: in one step where the system supports it (Linux, macOS), otherwise in two renames."""
    if _exchange_in_one_step(new, old):
        return
    backup = new.with_name(f"{new.name}.old")
    old.rename(backup)
    try:
        new.rename(old)
    except OSError:
        backup.rename(old)
        raise


def _exchange_in_one_step(new: Path, old: Path) -> bool:
    # Python has no function for this. Both system calls return 0 on success, and otherwise change nothing.
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return False
    if hasattr(libc, "renameat2"):  # Linux
        current_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return bool(libc.renameat2(current_folder, os.fsencode(new), current_folder, os.fsencode(old), exchange) == 0)
    if hasattr(libc, "renamex_np"):  # macOS
        swap = 2  # RENAME_SWAP
        return bool(libc.renamex_np(os.fsencode(new), os.fsencode(old), swap) == 0)
    return False
