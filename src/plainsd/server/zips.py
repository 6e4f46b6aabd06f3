"""Files as one zip that is written while it is sent, so that memory holds a piece of a file and no more."""

import time
from collections.abc import Generator
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

PIECE_READ = 2**18  # bytes that are read at once
EARLIEST = (1980, 1, 1, 0, 0, 0)  # a zip knows no time before


class Pieces:
    """A file that can only be written to; what was written is taken from it piece by piece."""

    def __init__(self) -> None:
        self.written = bytearray()

    def write(self, data: bytes) -> int:
        self.written += data
        return len(data)

    def flush(self) -> None:
        pass

    def taken(self) -> bytes:
        piece = bytes(self.written)
        self.written.clear()
        return piece


def zipped(files: list[tuple[Path, float]]) -> Generator[bytes, None, None]:
    """The bytes of a zip of these files, each with its time in seconds, under their bare names.

    Nothing is compressed, PNG files are so already. It is deflate with stored blocks all the same (level 0): of an
    entry whose length stands behind it, readers of streams take no other method.
    """
    out = Pieces()
    with ZipFile(out, "w") as archive:  # type: ignore[call-overload]
        for path, seconds in files:
            entry = ZipInfo(path.name, max(EARLIEST, time.localtime(seconds)[:6]))
            entry.compress_type, entry._compresslevel = ZIP_DEFLATED, 0  # type: ignore[attr-defined]
            with path.open("rb") as file, archive.open(entry, "w") as inside:
                while piece := file.read(PIECE_READ):
                    inside.write(piece)
                    yield out.taken()
    yield out.taken()
