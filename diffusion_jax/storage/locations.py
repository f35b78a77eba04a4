"""The local mirrors and copies that this process has opened, and what is done to files that may lie in a mirror.

Nothing is done for files that are only local.
"""

from __future__ import annotations

import pathlib

from diffusion_jax.storage.mirror import Mirror

__all__ = ["add_mirror", "add_url", "fetch", "find_mirror", "moved", "removed", "take", "with_urls", "written"]

_MIRRORS: list[Mirror] = []
_URLS: dict[str, str] = {}  # by local path


def add_mirror(mirror: Mirror) -> None:
    """Makes a mirror known, until the process ends."""
    _MIRRORS.append(mirror)
    add_url(mirror.root, mirror.url)


def add_url(path: pathlib.Path, url: str) -> None:
    """Makes known that a local directory is a copy of what a URL names."""
    _URLS[str(path)] = url


def find_mirror(path: pathlib.Path) -> Mirror | None:
    """The mirror that holds a path; None for a path that is only local."""
    return next((mirror for mirror in _MIRRORS if path.is_relative_to(mirror.root)), None)


def with_urls(text: str) -> str:
    """A text for people: the paths of mirrors and copies in it are replaced by the URLs that people know."""
    for path, url in _URLS.items():
        text = text.replace(path, url)
    return text


def written(path: pathlib.Path) -> None:
    """Uploads a finished file or directory if it lies in a mirror. Raises: OSError."""
    mirror = find_mirror(path)
    if mirror:
        mirror.upload(path)


def removed(path: pathlib.Path) -> None:
    """Deletes the objects of a file or directory that was removed, if it lies in a mirror."""
    mirror = find_mirror(path)
    if mirror:
        mirror.delete(path)


def moved(path: pathlib.Path, new_path: pathlib.Path) -> None:
    """Moves the objects of a directory that was renamed, if it lies in a mirror."""
    mirror = find_mirror(path)
    if mirror:
        mirror.move(path, new_path)


def fetch(path: pathlib.Path) -> pathlib.Path:
    """The same path, after a file that another process uploaded has been downloaded into its mirror."""
    mirror = find_mirror(path)
    if mirror:
        mirror.fetch(path)
    return path


def take(path: pathlib.Path) -> bool:
    """Removes a file that somebody may have put into a work directory. Returns: whether it was there.

    A bucket is asked at most every ten seconds.
    """
    mirror = find_mirror(path)
    if mirror:
        return mirror.take(path)
    try:
        path.unlink()
    except OSError:
        return False
    return True
