"""Download files once, resume interrupted downloads, and verify files whenever they are read."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pooch
import requests
from filelock import FileLock, Timeout

from .._log import logger

ENVIRONMENT = "SCTRAJ_DATA"  # the cache folder, if no argument names one
BLOCK = 2**20  # bytes of a file read at once
PIECE = 2**14  # bytes of a response read at once; at most so many are lost if it breaks off
ATTEMPTS = 5  # per file; each one continues where the previous one broke off
PATIENCE = 30.0  # seconds without a response after which a server counts as gone
# Mendeley Data rejects clients that do not look like a browser
USER_AGENT = "Mozilla/5.0 (compatible; sctraj)"


@dataclass(frozen=True)
class Source:
    r"""A file to download.

    Attributes
    ----------
    name
        Name of the file in the cache folder.
    url
        Its address.
    known
        Hash of its content: ``"sha256:..."``, or ``"git:..."``, the id of a git blob, which is the SHA-1 of
        ``b"blob <size>\0"`` and the content.
    """

    name: str
    url: str
    known: str


def fetched(source: Source, *, cache: str | os.PathLike[str] | None, progress: bool) -> Path:
    """Return the path of a file in the cache folder, downloading it if it is not there.

    A file that is already there is verified too. A download goes to ``<name>.part`` in the same folder and is moved
    once it has been verified, so that a file under its final name is always complete. If several processes need a
    file, one downloads it and the others wait.

    Parameters
    ----------
    source
        The file.
    cache
        The cache folder; by default the environment variable ``SCTRAJ_DATA``, or else the user's cache folder.
    progress
        Whether to show a progress bar.

    Raises
    ------
    ConnectionError
        If it cannot be downloaded; what has arrived is kept, and the next call continues from there.
    ValueError
        If the file in the cache folder, or at its source, has another content.
    """
    path = cache_folder(cache) / source.name
    if path.is_file():
        return _checked(path, source)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        # pooch uses a file that another process has downloaded meanwhile. It is given no hash, because it does not know
        # git ids, and a download is verified before it is handed over
        manager = pooch.create(
            path=path.parent, base_url="", registry={source.name: None}, urls={source.name: source.url}
        )
        return Path(manager.fetch(source.name, downloader=Resuming(path, source, progress=progress)))


def cache_folder(cache: str | os.PathLike[str] | None) -> Path:
    """Return the folder for downloads: the argument, the environment variable, or the user's cache folder."""
    chosen = cache or os.environ.get(ENVIRONMENT) or pooch.os_cache("sctraj")
    return Path(chosen).expanduser().resolve()


class _alone:
    """Lock a file's place in the cache folder; other processes wait for it, and log that they do."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = FileLock(path.with_name(f".{path.name}.lock"))

    def __enter__(self) -> None:
        try:
            self.lock.acquire(timeout=0.2)
        except Timeout:
            logger.info("waiting for another process that downloads %s", self.path)
            self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


class Resuming:
    """A downloader for pooch that continues where the last one broke off (pooch's own starts over).

    The part that has arrived is stored next to the file's place as ``<name>.part``, and its ETag, the server's name for
    that version of the content, as ``<name>.part.etag``. A server that does not support ranges, or has another version
    by now, sends the whole file. The result is verified before it is handed over, and deleted if its content is wrong.
    """

    def __init__(self, path: Path, source: Source, *, progress: bool) -> None:
        self.path, self.source, self.progress = path, source, progress
        self.part = path.with_name(f"{path.name}.part")
        self.etag = path.with_name(f"{path.name}.part.etag")

    def __call__(self, url: str, output_file: str | os.PathLike[str], manager: Any) -> None:
        """Download the file at ``url`` to ``output_file``."""
        for attempt in range(ATTEMPTS):
            before = self.arrived
            try:
                self._go_on(url)
                break
            except requests.RequestException as error:
                # try again after an interrupted download, but not if nothing arrived
                if self.arrived <= before or attempt == ATTEMPTS - 1:
                    raise ConnectionError(self._by_hand(error)) from error
        found = identity(self.part, self.source.known)
        if found != self.source.known:
            size = self.arrived
            self._forget()
            raise ValueError(
                f"expected {self.source.name} ({self.source.known}) at {url}, found another file of {size:,} bytes "
                f"({found}), which was thrown away. {self._place}"
            )
        os.replace(self.part, output_file)
        self._forget()

    @property
    def arrived(self) -> int:
        """Number of bytes that have arrived."""
        return self.part.stat().st_size if self.part.is_file() else 0

    @property
    def _place(self) -> str:
        return f"If you get the file by other means, put it at {self.path}"

    def _by_hand(self, error: Exception) -> str:
        kept = f" The {self.arrived:,} bytes that arrived are kept; call again to go on." if self.arrived else ""
        return (
            f"expected to download {self.source.name} from {self.source.url}, found no way to ({error}).{kept} "
            f"Without a connection, fetch it from that address elsewhere and put it at {self.path}"
        )

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.etag.unlink(missing_ok=True)

    def _go_on(self, url: str) -> None:
        """Request what is missing and append it; raise if it does not arrive completely."""
        start = self.arrived
        # request the bytes uncompressed, because ranges of a compressed stream would be useless
        headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
        known = self.etag.read_text() if self.etag.is_file() else ""
        if start:
            headers["Range"] = f"bytes={start}-"
            if known and not known.startswith("W/"):
                headers["If-Range"] = known  # RFC 9110, 13.1.5: the range if the version is the same, else all
        with requests.get(url, headers=headers, stream=True, timeout=PATIENCE) as response:
            if start and not self._continues(response, start, known):
                start = 0
                if response.status_code != requests.codes.ok:
                    self._forget()
                    return self._go_on(url)
            elif start and response.status_code == requests.codes.requested_range_not_satisfiable:
                return None  # it is complete
            response.raise_for_status()
            length = None if "Content-Encoding" in response.headers else response.headers.get("Content-Length")
            total = None if length is None else start + int(length)
            self.etag.write_text(response.headers.get("ETag", ""))
            with self.part.open("ab" if start else "wb") as file:
                for block in self._shown(response.iter_content(PIECE), start, total):
                    file.write(block)
        if total is not None and self.arrived != total:
            raise requests.ConnectionError(f"{self.arrived:,} of {total:,} bytes arrived")
        return None

    @staticmethod
    def _continues(response: requests.Response, start: int, known: str) -> bool:
        """Return whether a response continues from byte ``start`` of the version that has partly arrived."""
        contained = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            return contained is not None and contained[2] == str(start)
        if response.status_code != requests.codes.partial_content:
            # an error is no reason to start over; raise_for_status reports it
            return response.status_code >= 400
        same = not known or response.headers.get("ETag", known) == known
        return same and contained is not None and contained[1] == str(start)

    def _shown(self, blocks: Iterator[bytes], start: int, total: int | None) -> Iterator[bytes]:
        if not self.progress:
            yield from blocks
            return
        from tqdm.auto import tqdm  # imported here, as it warns in notebooks that lack its widgets

        with tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=self.source.name) as bar:
            for block in blocks:
                yield block
                bar.update(len(block))


def identity(path: Path, like: str) -> str:
    """Return the hash of a file's content, of the same kind as ``like``: ``"sha256:..."`` or ``"git:..."``."""
    manner = like.partition(":")[0]
    digest = hashlib.sha256() if manner == "sha256" else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return f"{manner}:{digest.hexdigest()}"


def _checked(path: Path, source: Source) -> Path:
    found = identity(path, source.known)
    if found != source.known:
        raise ValueError(
            f"expected {source.name} ({source.known}) at {path}, found another file of {path.stat().st_size:,} bytes "
            f"({found}). Move or delete it, and it will be downloaded from {source.url}"
        )
    return path
