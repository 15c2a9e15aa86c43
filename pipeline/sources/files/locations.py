"""Where a source's files are: a path, a folder, a glob, or any of these behind a URL."""

import glob
import io
import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

import fsspec

from pipeline.errors import SourceError
from pipeline.sources.files.formats import SUFFIXES

_ABOUT_THE_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""What `datasets` writes beside the data, in folders of any format."""

_SAVED = {"state.json", "dataset_info.json"}
"""The mark of a folder that `datasets.save_to_disk` wrote."""

_SAVED_DATA = ("data-*.arrow", "dataset.arrow")
"""Its rows; other Arrow files in it are caches. The second is how old versions called it."""

_BUFFER = 1 << 20

_SINGLE_FILE_PROTOCOLS = ("http", "https")
"""These cannot list a folder, and their `?` begins a query."""


class SourceFile(NamedTuple):
    """A file, as the tables name it, and its path or URL."""

    name: str
    url: str

    @property
    def shown(self) -> str:
        """The path or URL, less what may be secret in it."""
        return _shown(self.url)


def source_files(source: str, location: str | Path) -> list[SourceFile]:
    """A source's files in the order of their names.

    A folder is searched to any depth for files that end in one of `SUFFIXES`, and so is what a
    glob matches; a file is taken whatever it is called. Hidden files, and folders behind links,
    are passed over; of a folder that `datasets.save_to_disk` wrote, its data files are taken.

    Args:
        source: its name, for errors.
        location: a path, or a URL of any protocol that fsspec knows.

    Raises:
        SourceError: nothing is there, a name is not UTF-8, or the protocol needs a package that is
            not installed.
    """
    try:
        files = _local_files(location) if is_local(location) else _remote_files(str(location))
        for file in files:
            if _printable(file.name) != file.name:
                raise SourceError(f"{file.name!a}: its name is not UTF-8")
    except SourceError as error:
        where = _printable(_shown(str(location)))
        raise SourceError(f"source '{source}': {where}: {error}") from error.__cause__
    return files


def is_local(location: str | Path) -> bool:
    """Whether this is a path and no URL."""
    return isinstance(location, Path) or "://" not in location


def open_raw(file: SourceFile) -> "io.BufferedReader[Any]":
    """The file's bytes as they are stored."""
    if is_local(file.url):
        return io.BufferedReader(io.FileIO(file.url), _BUFFER)
    system, path = filesystem(file.url)
    return io.BufferedReader(system.open(path, "rb"), _BUFFER)


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    Raises:
        SourceError: no such protocol, or its package is missing.
    """
    if "::" in url:
        raise SourceError("chained URLs are not read")
    try:
        system, path = fsspec.url_to_fs(url)
    except ImportError as error:  # fsspec says which package to install
        raise SourceError(f"a package is missing: {error}") from error
    except Exception as error:  # each protocol has its own
        raise SourceError(said(error, url)) from error
    return system, cast(str, path)


def data_files(names: Iterable[str]) -> list[str]:
    """Those of a folder's files that hold rows, sorted; names are relative to the folder."""
    paths = [PurePosixPath(name) for name in names]
    inside: dict[PurePosixPath, set[str]] = {}
    for path in paths:
        inside.setdefault(path.parent, set()).add(path.name)
    saved = {folder for folder, held in inside.items() if held >= _SAVED}

    def holds_rows(path: PurePosixPath) -> bool:
        if any(part.startswith(".") for part in path.parts) or path.name in _ABOUT_THE_DATA:
            return False
        if path.parent in saved:
            return any(fnmatchcase(path.name, pattern) for pattern in _SAVED_DATA)
        return path.name.lower().endswith(SUFFIXES)

    return sorted(str(path) for path in paths if holds_rows(path))


def said(error: Exception, url: str) -> str:
    """An exception's own words, or its name, without what may be secret in the URL."""
    return (str(error) or type(error).__name__).replace(url, _shown(url))


def _local_files(location: str | Path) -> list[SourceFile]:
    path = os.fspath(location)
    if os.path.isfile(path):
        return [SourceFile(os.path.basename(path), path)]
    if os.path.isdir(path):
        root, names = path, _walk(path)
    elif glob.has_magic(path):
        root = _glob_root(path)
        found = glob.glob(path, recursive=True)
        names = [os.path.relpath(match, root or ".") for match in found if os.path.isfile(match)]
    else:
        raise SourceError("no such file or folder")
    return [SourceFile(name, os.path.join(root, name)) for name in _some(data_files(names))]


def _walk(folder: str) -> list[str]:
    def refuse(error: OSError) -> None:
        raise SourceError(f"cannot be searched: {error}") from error

    names = []
    for inner, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        # A link that leads nowhere is no file, but an error when it is read; a pipe would hang.
        names += [
            os.path.relpath(path, folder)
            for path in (os.path.join(inner, name) for name in files)
            if os.path.isfile(path) or os.path.islink(path)
        ]
    return names


def _remote_files(url: str) -> list[SourceFile]:
    system, path = filesystem(url)
    scheme, _, rest = url.partition("://")
    if scheme in _SINGLE_FILE_PROTOCOLS:
        return [SourceFile(PurePosixPath(urlsplit(url).path).name or rest, url)]
    try:
        if system.isfile(path):
            return [SourceFile(PurePosixPath(path).name, url)]
        if glob.has_magic(path):
            root, base = _glob_root(path), _glob_root(url)
            found = system.glob(path)
        elif system.isdir(path):
            root, base = path.rstrip("/") + "/", url.rstrip("/") + "/"
            found = system.find(path)
        else:
            raise SourceError("no such file or folder")
    except SourceError:
        raise
    except Exception as error:  # each protocol has its own
        raise SourceError(f"cannot be listed: {said(error, url)}") from error
    names = [match.removeprefix(root).lstrip("/") for match in found]
    return [SourceFile(name, base + name) for name in _some(data_files(names))]


def _glob_root(pattern: str) -> str:
    """The folder that a glob searches, with the slash that ends it; empty for the working one."""
    plain = pattern[: next(i for i in range(len(pattern)) if glob.has_magic(pattern[: i + 1]))]
    return plain[: plain.rfind("/") + 1]


def _some(names: list[str]) -> list[str]:
    if not names:
        raise SourceError(f"no file ends in {', '.join(SUFFIXES)}")
    return names


def _printable(text: str) -> str:
    return text.encode(errors="replace").decode()


def _shown(url: str) -> str:
    if is_local(url):
        return url
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
