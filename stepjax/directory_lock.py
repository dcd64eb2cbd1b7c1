"""A lock that lets only one process write in a directory; a second start is refused and does no harm.

    DIR/lock     names the process and is held (flock) until it ends, in any way

It protects against a second start on the same machine, and across machines only if the file system shares locks.
"""

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from stepjax.errors import CheckpointError

LOCK = "lock"
_log = logging.getLogger(__name__)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Creates the directory and keeps other processes out of it until the block ends.

    Raises:
        CheckpointError: the directory cannot be created or written, or another process (named) holds it.
    """
    path = directory / LOCK
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be made or written: {error.strerror}; name another --out") from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except BlockingIOError as error:
            holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
            raise CheckpointError(f"{directory} is being written by {holder}: wait for it, or stop it") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
            _log.warning("%s: %s; make sure that no other process writes there", path, error.strerror)
        yield
    finally:
        os.close(file)
