"""Where the bytes of shards and of their checksum files come from: here, the local file system.

`SampleReader` asks for nothing else, so another storage, say an object store with a cache of its own, is another class
with these four functions.
"""

import os
from pathlib import Path


class LocalShards:
    """Files that the operating system can open, read at any place and read ahead."""

    read_into = staticmethod(os.preadv)
    """(handle, buffers, first byte) -> bytes read; fewer than the buffers hold only at the end of the file."""
    close = staticmethod(os.close)

    def open(self, path: Path) -> int:
        """A handle to read from."""
        return os.open(path, os.O_RDONLY)

    def will_need(self, handle: int, first_byte: int, num_bytes: int) -> None:
        """Begins to fetch a part in the background; 0 bytes stand for all that follow."""
        os.posix_fadvise(handle, first_byte, num_bytes, os.POSIX_FADV_WILLNEED)
