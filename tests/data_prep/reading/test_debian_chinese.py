import gzip
import json
from pathlib import Path

import pytest

from data_prep.reading import debian_chinese
from data_prep.reading.corpus import find_inputs
from data_prep.reading.debian_chinese import DebianError
from data_prep.reading.debian_text import html_text, man_text
from data_prep.reading.documents import Document, plan_units, read_unit
from data_prep.reading.templates import Layout

MAN = r""".\" a comment
.TH SHU 1 "2022" "Trees" "手册"
.SH 名称
shu \- 数树的\fI程序\fP
.SH "概述 与 \(lq用法\(rq"
.B shu
[\fB\-a\fR] \" not shown
.BR \-\-all " 目录"
.PP
这一行断在
两个汉字之间，and
this one between words.
.TP
\fB\-a\fR, \fB\-\-all\fR
数所有的树
.IP \(bu 2
第二项
.nf
  for t in trees:
      print("\en")
.fi
.TS
l l.
表	格
.TE
.de XX
.B never shown
..
.UNKNOWN request
完
"""
MAN_TEXT = """名称
shu - 数树的程序

概述 与 “用法”
shu [-a] --all 目录

这一行断在两个汉字之间，and this one between words.

-a, --all
数所有的树

• 第二项
  for t in trees:
      print("\\n")
完"""

HTML = """<?xml version="1.0"?><html><head><title>书</title><style>p {}</style></head><body>
<div class="navheader"><img src="x"/><a href="y">上一页</a><br></div>
<div class="section"><h2>1. 树 &amp; 林</h2><p>这一行断在
  两个汉字之间，and
  this one &lt; words.<br/>新行<img src="z">。</p>
<pre>x = 1
    y = 2</pre>
<table><tr><th>名</th>
 <th>高</th></tr><tr><td>松</td><td>30</td></tr></table>
<ul class="docnav"><li>下一页</li></ul></div></body></html>"""
HTML_TEXT = """1. 树 & 林

这一行断在两个汉字之间，and this one < words.
新行。

x = 1
    y = 2

名 高
松 30"""


def test_a_manual_page_loses_its_markup_and_nothing_else():
    assert man_text(MAN) == MAN_TEXT
    assert man_text(".so man1/other.1\n") == ""


def test_a_web_page_loses_its_markup_and_navigation_and_nothing_else():
    assert html_text(HTML) == HTML_TEXT


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    man = tree / "usr/share/man/zh_CN/man1"
    book = tree / "usr/share/doc/debian-handbook/html/zh-CN"
    man.mkdir(parents=True)
    book.mkdir(parents=True)
    (man / "shu.1.gz").write_bytes(gzip.compress(MAN.encode()))
    (man / "alias.1.gz").symlink_to("shu.1.gz")
    (man / "cut.1.gz").write_bytes(gzip.compress(MAN.encode())[:40])
    (man / "gbk.1.gz").write_bytes(gzip.compress(MAN.encode("gb18030")))
    (book / "a.html").write_text(HTML)
    (book / "b.html").write_text("<p>not translated at all</p>")
    return tree


def test_chinese_pages_of_a_tree_are_found_once_and_in_order(tree: Path):
    assert list(debian_chinese.chinese_texts(tree)) == [
        {"text": MAN_TEXT, "package": "manpages-zh", "path": "usr/share/man/zh_CN/man1/shu.1.gz"},
        {
            "text": HTML_TEXT,
            "package": "debian-handbook",
            "path": "usr/share/doc/debian-handbook/html/zh-CN/a.html",
        },
    ]


def programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, script in scripts.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_the_command_writes_one_file_and_leaves_nothing_else(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    unpack = f"cp -a {tree}/usr ."
    programs(tmp_path / "bin", monkeypatch, apt_get="shift 4; touch $2.deb $3.deb", dpkg_deb=unpack)
    out = tmp_path / "new/out"
    assert debian_chinese.main([str(out)]) == 0
    assert "MB of Chinese text" in capsys.readouterr().out
    assert [path.name for path in out.iterdir()] == ["debian-chinese.jsonl"]
    (unit,) = plan_units(find_inputs([str(out / "*.jsonl")]), Layout.named("auto"))
    assert [item.text for item in read_unit(unit) if isinstance(item, Document)] == [MAN_TEXT, HTML_TEXT]
    assert {"text", "package", "path"} == set(json.loads((out / "debian-chinese.jsonl").read_text().splitlines()[0]))


@pytest.mark.parametrize(
    ("apt", "message"),
    [
        (
            'echo "W: odd" >&2; echo "E: Unable to locate package manpages-zh" >&2; exit 100',
            r"download manpages-zh .*: E: Unable to locate package manpages-zh\. .*apt-get update",
        ),
        ("exit 3", "exit code 3. Is a mirror reachable"),
        ("true", "no Chinese text found"),
    ],
)
def test_a_mirror_that_does_not_answer_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    apt: str,
    message: str,
):
    programs(tmp_path / "bin", monkeypatch, apt_get=apt, dpkg_deb="true")
    with pytest.raises(DebianError, match=message):
        debian_chinese.debian_chinese(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert debian_chinese.main([str(tmp_path / "out")]) == 69
    assert capsys.readouterr().err.startswith("error: ")


def test_a_machine_that_is_no_debian_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DebianError, match="apt-get: not found; Chinese texts come from packages of Debian or Ubuntu"):
        debian_chinese.debian_chinese(tmp_path / "out")
