"""Text files as documents: each whole, or each line, or each paragraph of it."""

from collections.abc import Iterable, Iterator

from data_prep.reading import storage, streams
from data_prep.reading.field_template import BadRecordError
from data_prep.reading.file_kinds import compression
from data_prep.reading.records import BadLine, Document, Unit, bad_line, decode
from data_prep.reading.streams import Line, StreamError

TEXT_TOO_LONG = f"text longer than {streams.MAX_LINE_BYTES // 1024**2} MiB"


def read_texts(unit: Unit) -> Iterator[Document | BadLine]:
    """Each file is a document."""
    for index, path in enumerate(unit.paths):
        content = b""
        try:
            content = _content(path)
            text = _checked(decode(content, unit.layout.encoding))
        except (BadRecordError, StreamError) as error:
            offset, line = _fault(content, unit.layout.encoding)
            yield bad_line(BadRecordError(str(error)), index, line, offset, content[offset : offset + 1000])
        else:
            yield Document(text, index, 0, 1)


def read_text_lines(unit: Unit) -> Iterator[Document | BadLine]:
    """Each line is a document; blank ones are passed over and not counted."""
    path = unit.paths[0]
    if compression(path):
        yield from _read_pieces(unit, _without_blank(unit, streams.compressed_lines(path)))
        return
    with storage.open_range(path) as file:
        yield from _read_pieces(unit, _without_blank(unit, streams.range_lines(file, unit.start, unit.stop)))


def read_paragraphs(unit: Unit) -> Iterator[Document | BadLine]:
    """What stands between blank lines is a document."""
    path = unit.paths[0]
    if compression(path):
        yield from _read_pieces(unit, _paragraphs(unit, streams.compressed_lines(path)))
        return
    with storage.open_range(path) as file:
        yield from _read_pieces(unit, _paragraphs(unit, streams.range_lines(file, 0, unit.stop)))


def _read_pieces(unit: Unit, pieces: Iterable[Line]) -> Iterator[Document | BadLine]:
    number = offset = 0
    try:
        for offset, content, is_cut in pieces:
            number += 1
            try:
                if is_cut:
                    raise BadRecordError(streams.LINE_TOO_LONG)
                text = _checked(decode(content, unit.layout.encoding))
            except BadRecordError as error:
                yield bad_line(error, 0, number, offset, content)
            else:
                yield Document(text.removesuffix("\r"), 0, offset, number)
    except StreamError as error:
        yield BadLine(0, number + 1, offset, str(error))


def _without_blank(unit: Unit, lines: Iterable[Line]) -> Iterator[Line]:
    return (line for line in lines if not _is_blank(line[1], unit.layout.encoding))


def _is_blank(content: bytes, encoding: str) -> bool:
    """Whether a line is empty or of nothing but white space, of which Unicode knows more than ASCII."""
    return not content or content.isspace() or content.decode(encoding, "replace").isspace()


def _paragraphs(unit: Unit, lines: Iterable[Line]) -> Iterator[Line]:
    """Lines joined; one that is too long, or would make its paragraph so, makes the paragraph a cut one."""
    start, parts, size_bytes, is_cut = 0, list[bytes](), 0, False
    for offset, content, is_line_cut in lines:
        if _is_blank(content, unit.layout.encoding):
            if parts:
                yield start, b"\n".join(parts), is_cut
            parts, size_bytes, is_cut = [], 0, False
            continue
        start = offset if not parts else start
        size_bytes += len(content) + 1
        is_cut = is_cut or is_line_cut or size_bytes > streams.MAX_LINE_BYTES
        parts = [b"\n".join([*parts, content])[: streams.HEAD_BYTES]] if is_cut else [*parts, content]
    if parts:
        yield start, b"\n".join(parts), is_cut


def _content(path: str) -> bytes:
    """The whole content of a file.

    Raises:
        BadRecordError: it is longer than one document may be.
        StreamError: it is compressed, and damaged or cut short.
    """
    if compression(path):
        blocks, size_bytes = list[bytes](), 0
        for block in streams.decompressed(path):
            blocks.append(block)
            size_bytes += len(block)
            if size_bytes > streams.MAX_LINE_BYTES:
                raise BadRecordError(TEXT_TOO_LONG)
        return b"".join(blocks)
    with storage.open_range(path) as file:
        content = file.read(streams.MAX_LINE_BYTES + 1)
    if len(content) > streams.MAX_LINE_BYTES:
        raise BadRecordError(TEXT_TOO_LONG)
    return content


def _checked(text: str) -> str:
    if not text or text.isspace():
        raise BadRecordError("empty text")
    return text


def _fault(content: bytes, encoding: str) -> tuple[int, int]:
    """Where the line begins that makes a text unreadable, and its number; the first line if none does."""
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        return content.rfind(b"\n", 0, error.start) + 1, content.count(b"\n", 0, error.start) + 1
    return 0, 1
