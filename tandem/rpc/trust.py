"""What a service and its clients look at before they trust: a token's text, and where a Unix socket lies."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from tandem.errors import invalid

_TOKEN = re.compile(r"[!-~]+")


def check_token(token: str, field: str = "token") -> str:
    """Return the token. Raises InvalidArgument, naming `field`, if it cannot be a header's value."""
    if not _TOKEN.fullmatch(token):
        raise invalid(field, "must be printable ASCII without spaces, and not empty")
    return token


def read_token(path: Path, field: str = "token_file") -> str:
    """The token in a file, without the space around it. Raises InvalidArgument, naming `field`, if it holds none."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise invalid(field, f"cannot read {path}: {error.strerror}") from error
    try:
        return check_token(text.decode().strip(), field)
    except ValueError as error:  # of either; the text stays untold
        raise invalid(
            field, f"{path} holds no token: printable ASCII without spaces, and not empty"
        ) from error


def check_place(path: Path, field: str) -> None:
    """Refuse a socket in whose place another user could put one of theirs, to read what is meant for the service.

    What does not exist is nobody's. Root is trusted.

    Raises:
        InvalidArgument: names `field`.
    """
    folder = path.parent
    trusted = (os.geteuid(), 0)
    try:
        found = folder.stat()
        owners = [(folder, found.st_uid), (folder, folder.lstat().st_uid)]  # who made a link may change it
        if os.path.lexists(path):
            owners.append((path, path.lstat().st_uid))
    except FileNotFoundError:
        return
    except OSError as error:
        raise invalid(field, f"cannot look at {path}: {error.strerror}") from error
    for name, uid in owners:
        if uid not in trusted:
            raise invalid(field, f"{name} is another user's: choose a folder of your own")
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        raise invalid(field, f"every user may replace what is in {folder}: choose a folder of your own")
