"""Weights on the Hugging Face Hub, hf://OWNER/NAME[/FILE][@REVISION], read through huggingface_hub and its cache.

huggingface_hub's settings apply: HF_TOKEN or `hf auth login` (token), HF_HOME (cache), HF_HUB_OFFLINE, HF_ENDPOINT (mirror).
Every file is compared with the digest that the Hub states for it.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import os
import pathlib
import posixpath
import re
from collections.abc import Iterable, Mapping
from typing import Any

from diffusion_jax.errors import StorageError, closest_names, first_line, list_names, needs_extra, print_text
from diffusion_jax.files import downloads_root, require_space

_SCHEME = "hf://"
_FORM = re.compile(r"hf://([\w.-]+/[\w.-]+)((?:/[^/@]+)*)(?:@([\w.-]+|refs/[\w./-]+))?")
_FORMATS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl")  # in order of preference, in each folder
_NOT_READ = ("samples/", "images/", "plugins/", "evaluation/", "events.out.tfevents.")  # in a published work directory
_CARD, _CARD_LENGTH = "README.md", 65536
OWN_FILE = "diffusion_jax.safetensors"  # published weights in this package's format, beside diffusers'


@dataclasses.dataclass(frozen=True)
class HubFiles:
    """Downloaded weights. path: the file or folder. origin: "source", the URL with its commit; "license"; "page"."""

    path: pathlib.Path
    origin: Mapping[str, str]


def is_hub(text: str | os.PathLike) -> bool:
    """Returns whether a location is a name on the Hub, hf://OWNER/NAME."""
    return os.fspath(text).startswith(_SCHEME)


@functools.cache  # a program that reads the weights several times gets one version of them
def download(url: str) -> HubFiles:
    """Downloads weights from the Hub, unless the cache has them, and prints their license.

    url: a repository (only one network's files are downloaded), or a file or folder in a repository. REVISION: a branch, a
    tag or a commit. A dropped connection is resumed; a rerun downloads only files that were not finished. Without network,
    the files are read from the cache, or from a folder that was filled by hand.
    Raises: StorageError, one line, for a wrong name, a missing or gated repository, a digest that differs, a full disk, or no
    network.
    """
    if not (match := _FORM.fullmatch(url.rstrip("/"))) or ".." in url:
        raise StorageError(
            f"{url}: a name on the Hub is hf://OWNER/NAME, hf://OWNER/NAME/FILE or either with @REVISION at the end"
        )
    repository, file, revision = match[1], match[2].lstrip("/"), match[3] or "main"
    with needs_extra(f"{url} needs huggingface_hub", "hub", StorageError):
        import httpx2
        import huggingface_hub as hub
        from huggingface_hub import constants, errors
    page = f"{constants.ENDPOINT}/{repository}"
    try:
        info = hub.HfApi().model_info(repository, revision=revision, files_metadata=True)
        files = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        needed = _choose(url, files, file)
        missing = [name for name in needed if not hub.try_to_load_from_cache(repository, name, revision=info.sha)]
        size, cache = sum(files[name].size or 0 for name in missing), pathlib.Path(constants.HF_HUB_CACHE)
        require_space(cache, url, size, "set HF_HOME to a directory on a larger disk")
        folder = pathlib.Path(hub.snapshot_download(repository, revision=revision, allow_patterns=needed))
        if folder.name != info.sha:
            raise StorageError(f"{url} changed while it was downloaded; rerun the same command")
        digests = {name: lfs.sha256 if (lfs := files[name].lfs) else files[name].blob_id for name in needed}
    except (httpx2.TransportError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        folder, digests = _find_local(hub, url, repository, revision, page, error), {}
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        needed = _choose(url, names, file)
    except OSError as error:  # includes HTTP errors from the Hub
        login = "log in with `hf auth login` or set HF_TOKEN"
        reason = f"it cannot be downloaded ({first_line(error)}); rerun the same command"
        if isinstance(error, errors.GatedRepoError):
            reason = f"{page} is gated; accept its conditions there, then {login}"
        elif isinstance(error, errors.RepositoryNotFoundError):
            reason = f"{page} does not exist or is private; check OWNER/NAME, or {login}"
        elif isinstance(error, errors.RevisionNotFoundError):
            reason = f"{page} has no revision {revision!r}; its branches and tags are on {page}"
        elif error.errno == errno.ENOSPC:
            reason = "the disk is full; set HF_HOME to a directory on a larger disk"
        raise StorageError(f"{url}: {reason}") from None
    for name in needed:
        _check_digest(url, folder / name, digests.get(name) or (folder / name).resolve().name)
    license_name = _read_license(folder / _CARD)
    print_text(f"License of {url}: {license_name} ({page})")
    is_single = not any(name.endswith(".json") or "/" in name for name in needed)  # no other file describes the weights
    path = folder / (file or (needed[0] if is_single else ""))
    source = f"{_SCHEME}{repository}{match[2]}@{folder.name}"
    return HubFiles(path, {"source": source, "license": license_name, "page": page})


def upload(folder: pathlib.Path, url: str) -> None:
    """Uploads the files of a folder to a repository, hf://OWNER/NAME, which is created if it does not exist.

    Raises: StorageError, one line, for a wrong name, a missing token, or no network.
    """
    repository = check_repository(url)
    with needs_extra(f"{url} needs huggingface_hub", "hub", StorageError):
        import httpx2
        import huggingface_hub as hub
    try:
        hub.HfApi().create_repo(repository, exist_ok=True)
        hub.HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message="Publish weights")
    except (httpx2.TransportError, OSError, ValueError) as error:  # includes HTTP errors from the Hub
        status = getattr(getattr(error, "response", None), "status_code", None)
        login = "; log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
        advice = login if status in (401, 403) else ""
        raise StorageError(f"{url} cannot be written ({first_line(error)}){advice}") from None


def check_repository(url: str) -> str:
    """Returns OWNER/NAME of hf://OWNER/NAME. Raises: StorageError for another form."""
    match = _FORM.fullmatch(url)
    if not match or match[2] or match[3] or set(match[1].split("/")) & {".", ".."}:
        raise StorageError(f"{url}: weights are published to hf://OWNER/NAME")
    return match[1]


def _choose(url: str, names: Iterable[str], file: str) -> list[str]:
    """Returns the file names of one network and its model card. Raises: StorageError for no network, or for several."""
    names = sorted(names)
    card = [name for name in names if name == _CARD]
    if file:  # a file, a folder, or the prefix of a TensorFlow checkpoint
        chosen = [name for name in names if name == file or name.startswith((f"{file}/", f"{file}."))]
        if not chosen:
            near = closest_names(file, names, 5)
            known = list_names([*near, *(name for name in names if name not in near)])
            raise StorageError(f"{url}: the repository has no {file}; it has {known}")
        return [*chosen, *card]
    if OWN_FILE in names:
        return [OWN_FILE, *card]
    if any(name.startswith("checkpoints/") for name in names):
        return [name for name in names if not name.startswith(_NOT_READ)]
    chosen, weights = [], []
    for folder in ("", "unet", "scheduler"):
        inside = [name for name in names if posixpath.dirname(name) == folder]
        found = next(filter(None, ([name for name in inside if name.endswith(end)] for end in _FORMATS)), [])
        if f"{folder}/config.json".lstrip("/") in inside:  # only diffusers' plain names, no variants such as fp16
            found = [name for name in found if posixpath.splitext(posixpath.basename(name))[0].endswith("_model")]
        weights += found
        chosen += [*found, *(name for name in inside if name.endswith(".json"))]
    if not weights:
        raise StorageError(f"{url}: the repository has no file of weights; it has {list_names(names)}")
    if len(weights) > 1:
        raise StorageError(f"{url} has several files of weights; name one: {url}/FILE with {list_names(weights, 20)}")
    return [*chosen, *card]


def _find_local(hub: Any, url: str, repository: str, revision: str, page: str, error: Exception) -> pathlib.Path:
    """Returns a folder with a revision's files, in huggingface_hub's cache or filled by hand. Raises: StorageError."""
    cache = pathlib.Path(hub.constants.HF_HUB_CACHE)
    for found in hub.scan_cache_dir(cache).repos if cache.exists() else ():
        for version in found.revisions if (found.repo_id, found.repo_type) == (repository, "model") else ():
            if revision in (version.commit_hash, *version.refs):
                return version.snapshot_path
    by_hand = downloads_root() / "hf" / f"{repository}@{revision}".removesuffix("@main")
    if by_hand.is_dir():
        return by_hand
    raise StorageError(
        f"{url} is not in {cache}, and {page} cannot be reached ({first_line(error)}); download its files on another machine "
        f"into {by_hand}, or give the path of the files"
    )


def _check_digest(url: str, path: pathlib.Path, digest: str) -> None:
    """Compares a file with its digest: SHA-256, or git's SHA-1 for small files. Raises: StorageError, and removes the file.

    A file is not compared if `digest` is another text, as for a file that was put into the folder by hand.
    """
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest):
        return
    start = f"blob {path.stat().st_size}\0".encode() if len(digest) == 40 else b""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.new("sha256" if len(digest) == 64 else "sha1", start))
    if found.hexdigest() != digest:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise StorageError(
            f"{url}: {path.name} differs from the digest that the Hub states ({digest}), and was removed; rerun the same "
            "command"
        )


def _read_license(card: pathlib.Path) -> str:
    """Returns the license in the metadata of a model card."""
    text = ""
    if card.is_file():
        with card.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_CARD_LENGTH)
    metadata = text.partition("\n---")[0] if text.startswith("---") else ""
    found = re.search(r'^license:[ \t]*"?([\w.-]+)', metadata, re.MULTILINE)
    return found[1] if found else "none stated; ask the owner"
