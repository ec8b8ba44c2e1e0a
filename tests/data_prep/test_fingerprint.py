import hashlib
from pathlib import Path

import pytest

from data_prep.fingerprint import HEAD_BYTES, TAIL_BYTES, Fingerprint, fingerprint


@pytest.mark.parametrize("size_bytes", [0, 1, HEAD_BYTES, HEAD_BYTES + 1, HEAD_BYTES + TAIL_BYTES + 5])
def test_a_fingerprint_is_size_and_md5_of_first_and_last_mebibyte(tmp_path: Path, size_bytes: int):
    content = bytes(i % 251 for i in range(size_bytes))
    path = tmp_path / "file"
    path.write_bytes(content)
    md5 = [hashlib.md5(part).hexdigest() for part in (content[: 1 << 20], content[-(1 << 20) :])]
    assert fingerprint(path) == Fingerprint(size_bytes, *md5)
    assert fingerprint(path).file_id == f"{md5[0]}-{md5[1]}-{size_bytes}"


def test_a_byte_appended_or_changed_at_either_end_changes_the_file_id(tmp_path: Path):
    path = tmp_path / "file"
    content = bytes(3 * HEAD_BYTES)
    ids = set()
    for changed in (content, b"x" + content[1:], content[:-1] + b"x", content + b"\0"):
        path.write_bytes(changed)
        ids.add(fingerprint(path).file_id)
    assert len(ids) == 4
