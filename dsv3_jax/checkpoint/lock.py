"""A lock on a run directory, so that two processes do not train in it at once."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import weakref

from etils import epath

_NO_LOCKS = errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK
"""What file systems say that know no such locks, as Lustre without -o flock."""


class FolderLock:
    """Held until it is released, forgotten, or the process is gone, however it ended: the kernel sees to that.

    The file stays; to remove it would let a third process lock another file under the same name. It says who holds the lock,
    or held it last.
    """

    def __init__(self, folder: epath.Path, file: epath.Path) -> None:
        """Locks `folder`, by `file` in it.

        Raises:
          ValueError: if another process holds the lock, by its process id and host.
          OSError: if the file cannot be written.
        """
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(handle, 1000, 0).decode(errors="replace").strip() or "another process"
                raise ValueError(
                    f"{folder} is being trained in by {holder}; wait until it has ended, or name another --run-dir"
                ) from error
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                print(f"warning: {folder} is where files cannot be locked; start no second run in it", file=sys.stderr)
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except BaseException:
            os.close(handle)
            raise
        self.release = weakref.finalize(self, os.close, handle)
        """Gives the lock up; may be called again."""
