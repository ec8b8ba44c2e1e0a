"""Checkpoints from somebody who knows the format and makes every hash right: nothing runs, nothing outside is opened.

Each is loaded in a process of its own, with an audit hook that writes down what is compiled, executed, unpickled or
opened outside the run folder; an alarm kills the process if it waits, a limit stops it from taking memory.
"""

import ast
import contextlib
import json
import os
import pickle
import resource
import signal
import stat
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from resume import checkpoint
from resume.checkpoint import CheckpointError
from tests.records import rewrite, save

WEIGHTS = "rank-00000.safetensors"
ROOT = Path(__file__).parents[2]
FORBIDDEN = {"exec", "compile", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "import"}
FORBIDDEN |= {"pickle.find_class", "marshal.loads", "ctypes.dlopen", "socket.connect"}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"model.a": torch.randn(5, 3, generator=generator), "model.b": torch.randn(7, generator=generator)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint, with a file outside the run folder that is one of weights, too."""
    saved = save(tmp_path / "run", 12, tensors(), {"data": {"position": 4}}, "[run]\n")
    (tmp_path / "outside.safetensors").write_bytes((saved / WEIGHTS).read_bytes())
    (tmp_path / "config.toml").write_text("[run]\n")
    return saved


def watched(run: Path, action: Callable[[], object]) -> tuple[list[str], list[str]]:
    """Does something in a watched process; returns what it forbids itself, and what the action returned."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        events: list[str] = []
        watching = True

        def on_event(event: str, arguments: tuple) -> None:
            if not watching:
                return
            path = arguments[0] if event == "open" else None
            outside = isinstance(path, str) and not Path(path).resolve().is_relative_to(run.resolve())
            if event in FORBIDDEN or outside:
                events.append(f"{event} {str(arguments)[:200]}")

        result: Any = ["died"]
        try:
            torch.set_num_threads(1)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, 20)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))
            sys.addaudithook(on_event)
            result = action()
        except BaseException as error:
            result = [f"{type(error).__name__}: {error}"]
        finally:
            watching = False
            os.write(write, json.dumps([events, result]).encode()[:60_000])
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"killed by signal {-status}: it hung, or took too much memory"
    return json.loads(told)


def load_in_all_ways(folder: Path) -> list[str]:
    """What becomes of every way to read a checkpoint."""
    outcomes = []

    def into() -> object:
        return checkpoint.open_checkpoint(folder).load_into({name: value.clone() for name, value in tensors().items()})

    def verified() -> object:
        checkpoint.verify(folder)
        return checkpoint.open_checkpoint(folder).read_tensors("")

    def newest() -> object:
        found = checkpoint.newest_valid(folder.parent, lambda text: None)
        assert found is not None
        return found.read_tensors("")

    for way in (into, verified, newest):
        try:
            way()
            outcomes.append("loaded")
        except CheckpointError as error:
            outcomes.append(f"refused: {error}")
        except Exception as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    return outcomes


class Payload:
    """Whoever unpickles it makes a folder."""

    def __init__(self, sign: Path):
        self.sign = sign

    def __reduce__(self) -> tuple:
        return os.system, (f"mkdir {self.sign}",)


def described(content: bytes) -> dict[str, Any]:
    return {"size_bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}


def change(folder: Path, action: Callable[[dict], object]) -> None:
    rewrite(folder / "record.json", action)


def change_a(folder: Path, **entries: Any) -> None:
    """Changes what the record says of model.a, a matrix of 5 x 3 in one piece."""
    change(folder, lambda table: table["tensors"]["model.a"].update(entries))


def change_piece(folder: Path, **entries: Any) -> None:
    change(folder, lambda table: table["tensors"]["model.a"]["pieces"][0].update(entries))


def rename_file(folder: Path, name: str) -> None:
    """Lets the record call the file of weights something else, also in the pieces."""

    def rename(table: dict) -> None:
        table["files"][name] = table["files"].pop(WEIGHTS)
        for entry in table["tensors"].values():
            entry["pieces"][0]["file"] = name

    change(folder, rename)


def replace_weights(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).write_bytes(content)
    change(folder, lambda table: table["files"].update({WEIGHTS: described(content)}))


def replace_header(folder: Path, action: Callable[[dict], object], length: int | None = None) -> None:
    """Changes the header of the file of weights, and what it says of its own length."""
    content = (folder / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    action(header)
    text = json.dumps(header).encode()
    replace_weights(folder, struct.pack("<Q", length or len(text)) + text + content[8 + size :])


def replace_by(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def device(path: Path) -> None:
    """Reading it never ends; a link to it where only root may make one."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:
        path.symlink_to("/dev/zero")


def write_record(folder: Path, text: str) -> None:
    (folder / "record.json").write_text(text)


def nest(folder: Path, depth: int) -> None:
    """Its hash is the right one, as far as it can be computed at all."""
    table = json.loads((folder / "record.json").read_text())
    del table["xxh3_128"]
    deep = "[" * depth + "]" * depth
    digest = xxhash.xxh3_128_hexdigest(
        json.dumps({**table, "zzz": 0}, sort_keys=True).replace('"zzz": 0', deep).encode()
    )
    write_record(folder, json.dumps({"xxh3_128": digest, **table, "zzz": 0}).replace('"zzz": 0', f'"zzz": {deep}'))


def double_keys(folder: Path) -> None:
    """A reader that takes the first one sees another file."""
    record = folder / "record.json"
    record.write_text(
        record.read_text().replace('"files": {', '"files": {"../../outside.safetensors": {}}, "files": {')
    )


def link_weights(folder: Path) -> None:
    replace_by(folder / WEIGHTS, lambda path: path.symlink_to(folder.parents[1] / "outside.safetensors"))


def link_record(folder: Path) -> None:
    outside = (folder / "record.json").rename(folder.parents[1] / "record.json")
    (folder / "record.json").symlink_to(outside)


def link_config(folder: Path, *, is_listed: bool) -> None:
    replace_by(folder / "config.toml", lambda path: path.symlink_to("/etc/passwd"))
    entry = described(Path("/etc/passwd").read_bytes())
    change(folder, lambda table: table["files"].update({"config.toml": entry}))
    if not is_listed:
        change(folder, lambda table: table["files"].pop("config.toml"))


def pickle_weights(folder: Path) -> None:
    replace_weights(folder, pickle.dumps(Payload(folder.parents[1] / "owned")))


def torch_weights(folder: Path) -> None:
    path = folder.parents[1] / "payload.pt"
    torch.save({"model.a": Payload(folder.parents[1] / "owned")}, path)
    replace_weights(folder, path.read_bytes())


def overlap(folder: Path) -> None:
    """As many elements as the matrix has, but some twice and some never."""
    content = (folder / WEIGHTS).read_bytes()
    (folder / "rank-00001.safetensors").write_bytes(content)
    pieces = [{"file": file, "offset": [0, 0], "shape": [5, 3]} for file in (WEIGHTS, "rank-00001.safetensors")]
    change(folder, lambda table: table["files"].update({"rank-00001.safetensors": described(content)}))
    change_a(folder, shape=[10, 3], pieces=pieces)


def crumbs(folder: Path) -> None:
    """They cover the tensor, but to compare each with each other would take minutes."""
    change_a(folder, shape=[20_000], pieces=[{"file": WEIGHTS, "offset": [i], "shape": [1]} for i in range(20_000)])


def become_a_pipe(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    os.mkfifo(folder)


def first(header: dict) -> dict:
    return header["model.a"]


ATTACKS: dict[str, Callable[[Path], object]] = {
    "file in a parent folder": lambda folder: rename_file(folder, "../../outside.safetensors"),
    "file with an absolute name": lambda folder: rename_file(folder, str(folder.parents[1] / "outside.safetensors")),
    "file through its own folder": lambda folder: rename_file(folder, f"../{folder.name}/{WEIGHTS}"),
    "file in a subfolder": lambda folder: rename_file(folder, f"x/{WEIGHTS}"),
    "file with a line end": lambda folder: rename_file(folder, f"{WEIGHTS}\n"),
    "file with a zero byte": lambda folder: rename_file(folder, f"{WEIGHTS}\0"),
    "file with other digits": lambda folder: rename_file(folder, "rank-٠٠٠٠٠.safetensors"),
    "file is a device by name": lambda folder: rename_file(folder, "/dev/zero"),
    "piece in a parent folder": lambda folder: change_piece(folder, file="../../outside.safetensors"),
    "piece with an absolute name": lambda folder: change_piece(folder, file="/etc/passwd"),
    "piece in a list": lambda folder: change_piece(folder, file=[WEIGHTS]),
    "piece in the config": lambda folder: change_piece(folder, file="config.toml"),
    "weights are a link": link_weights,
    "record is a link": link_record,
    "config is a link to passwords": lambda folder: link_config(folder, is_listed=True),
    "config is a link, and not listed": lambda folder: link_config(folder, is_listed=False),
    "weights are a pipe": lambda folder: replace_by(folder / WEIGHTS, os.mkfifo),
    "record is a pipe": lambda folder: replace_by(folder / "record.json", os.mkfifo),
    "config is a pipe": lambda folder: replace_by(folder / "config.toml", os.mkfifo),
    "checkpoint is a pipe": become_a_pipe,
    "weights are a device": lambda folder: replace_by(folder / WEIGHTS, device),
    "record is a device": lambda folder: replace_by(folder / "record.json", device),
    "weights are a folder": lambda folder: replace_by(folder / WEIGHTS, Path.mkdir),
    "record is a folder": lambda folder: replace_by(folder / "record.json", Path.mkdir),
    "weights are a pickle": pickle_weights,
    "weights are a file of torch.save": torch_weights,
    "record is a pickle": lambda folder: (folder / "record.json").write_bytes(
        pickle.dumps(Payload(folder.parents[1] / "owned"))
    ),
    **{
        f"dtype is {dtype!r}": lambda folder, dtype=dtype: change_a(folder, dtype=dtype)
        for dtype in ("load", "__class__", "Tensor", "qint8", "float64", "", 5, None, ["float32"], {})
    },
    **{
        f"a shape with {size!r}": lambda folder, size=size: change_a(folder, shape=[size, 3])
        for size in (-5, 10**30, True, 5.0, float("nan"), float("inf"), "5", None, [5], 4)
    },
    **{
        f"a piece with {size!r}": lambda folder, size=size: change_piece(folder, shape=[size, 3])
        for size in (-5, 10**30, True, 5.0, float("nan"), "5", None, [5], 4, 6)
    },
    "an offset below zero": lambda folder: change_piece(folder, offset=[-1, 0]),
    "an offset out of the tensor": lambda folder: change_piece(folder, offset=[1, 0]),
    "no shape": lambda folder: change_a(folder, shape=[], pieces=[]),
    "a piece of another rank": lambda folder: change_piece(folder, shape=[5], offset=[0]),
    "terabytes in no piece": lambda folder: change_a(folder, shape=[10**12], pieces=[]),
    "terabytes in a small file": lambda folder: (
        change_a(folder, shape=[10**12]),
        change_piece(folder, offset=[0], shape=[10**12]),
    ),
    "terabytes after an offset": lambda folder: (
        change_a(folder, shape=[10**12]),
        change_piece(folder, offset=[10**12 - 15], shape=[15]),
    ),
    "nothing times too much": lambda folder: change_a(folder, shape=[2**40, 2**40, 0], pieces=[]),
    "nothing times far too much": lambda folder: change_a(folder, shape=[0, 10**30], pieces=[]),
    "pieces that overlap": overlap,
    "the same piece twice": lambda folder: change(
        folder, lambda table: table["tensors"]["model.a"].update(pieces=table["tensors"]["model.a"]["pieces"] * 2)
    ),
    "twenty thousand pieces": crumbs,
    **{f"{depth:,} lists in lists": lambda folder, depth=depth: nest(folder, depth) for depth in (900, 990, 10**5)},
    "keys that are double": double_keys,
    "record is a list": lambda folder: write_record(folder, "[]"),
    "record is null": lambda folder: write_record(folder, "null"),
    "record is a number": lambda folder: write_record(folder, "7"),
    "record is a huge number": lambda folder: write_record(folder, "7" * 1_000_000),
    "record is a float beyond all": lambda folder: write_record(folder, "1e999999999"),
    "record has no end": lambda folder: os.truncate(folder / "record.json", 1 << 40),
    "step is text": lambda folder: change(folder, lambda table: table.update(step="12")),
    "step is true": lambda folder: change(folder, lambda table: table.update(step=True)),
    "step is below zero": lambda folder: change(folder, lambda table: table.update(step=-1)),
    "format is a list": lambda folder: change(folder, lambda table: table.update(format=[2])),
    "files are a list": lambda folder: change(folder, lambda table: table.update(files=[WEIGHTS])),
    "a file is null": lambda folder: change(folder, lambda table: table["files"].update({WEIGHTS: None})),
    "tensors are missing": lambda folder: change(folder, lambda table: table.pop("tensors")),
    "tensors are a list": lambda folder: change(folder, lambda table: table.update(tensors=["model.a"])),
    "a tensor is text": lambda folder: change(folder, lambda table: table["tensors"].update({"model.a": "x"})),
    "a tensor's name is no text": lambda folder: change(
        folder, lambda table: table["tensors"].update({"model.\ud800": table["tensors"].pop("model.a")})
    ),
    "a tensor's name moves the cursor": lambda folder: change(
        folder, lambda table: table["tensors"].update({"model.\033[2J": table["tensors"].pop("model.a")})
    ),
    "header with other offsets": lambda folder: replace_header(
        folder, lambda header: first(header).update(data_offsets=[4, 64])
    ),
    "header with offsets out of the file": lambda folder: replace_header(
        folder, lambda header: first(header).update(data_offsets=[0, 1 << 40])
    ),
    "header with terabytes": lambda folder: replace_header(
        folder, lambda header: first(header).update(shape=[1 << 40], data_offsets=[0, 1 << 42])
    ),
    "header with offsets that overlap": lambda folder: replace_header(
        folder, lambda header: header["model.b"].update(data_offsets=[0, 28])
    ),
    "header with another shape": lambda folder: replace_header(
        folder, lambda header: first(header).update(shape=[3, 5])
    ),
    "header with another type": lambda folder: replace_header(folder, lambda header: first(header).update(dtype="I32")),
    "header with a type unknown to torch": lambda folder: replace_header(
        folder, lambda header: first(header).update(dtype="F4", shape=[40, 3])
    ),
    "header with a type unknown to all": lambda folder: replace_header(
        folder, lambda header: first(header).update(dtype="__class__")
    ),
    "header that is too long": lambda folder: replace_header(folder, lambda header: None, length=2**63),
    "header that lacks a tensor": lambda folder: replace_weights(folder, struct.pack("<Q", 2) + b"{}"),
    "weights are empty": lambda folder: replace_weights(folder, b""),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_malicious_checkpoint_is_refused_and_runs_and_opens_nothing(folder: Path, attack: str):
    load_in_all_ways(folder)  # what the first load imports
    ATTACKS[attack](folder)
    events, outcomes = watched(folder.parent, lambda: load_in_all_ways(folder))
    assert events == []
    assert len(outcomes) == 3
    assert all(outcome.startswith("refused: ") for outcome in outcomes), outcomes
    assert not any("memory" in outcome or outcome.endswith(": ") for outcome in outcomes)  # nobody asked for too much
    assert not (folder.parents[1] / "owned").exists()


def test_what_else_lies_in_a_checkpoint_is_not_opened(folder: Path):
    sign = folder.parents[1] / "owned"
    for name in ("rank-00001.safetensors", "optimizer.pt", ".metadata", "sitecustomize.py", "config.pkl"):
        (folder / name).write_bytes(pickle.dumps(Payload(sign)))
    os.mkfifo(folder / "rank-00002.safetensors")
    load_in_all_ways(folder)
    assert watched(folder.parent, lambda: load_in_all_ways(folder)) == [[], ["loaded"] * 3]
    assert not sign.exists()


def test_the_watch_sees_what_a_payload_does(folder: Path):
    """Else the tests above would prove nothing."""
    sign, payload = folder.parents[1] / "owned", pickle.dumps(Payload(folder.parents[1] / "owned"))

    def misuse() -> list[str]:
        pickle.loads(payload)
        eval("1 + 1")
        (folder.parents[1] / "config.toml").read_text()
        (folder / "config.toml").read_text()
        return []

    events, _ = watched(folder.parent, misuse)
    assert sign.is_dir()
    assert {event.split()[0] for event in events} >= {"pickle.find_class", "os.system", "compile", "exec", "open"}
    assert len([event for event in events if event.startswith("open ")]) == 1

    def wait_for_ever() -> list[str]:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with contextlib.suppress(KeyError):
            signal.pause()
        return []

    with pytest.raises(AssertionError, match="killed by signal 14"):
        watched(folder.parent, wait_for_ever)
    assert "can't allocate memory" in str(watched(folder.parent, lambda: [str(torch.empty(1 << 40).shape)]))


PRODUCT = ("packages", "kernels", "model", "data_prep", "resume", "train", "evaluation", "benchmarks")
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}


def unsafe_uses(source: str) -> list[str]:
    """What a source file does that could run the content of a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found += [node.module] if (node.module or "").split(".")[0] in UNSAFE_MODULES else names & UNSAFE_CALLS
        elif isinstance(node, ast.Call):
            name, keywords = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            found += [name] if name in UNSAFE_CALLS else []
            found += [name] if name == "torch.load" and keywords.get("weights_only") != "True" else []
            found += [
                f"{key}={keywords[key]}"
                for key, safe in (("weights_only", "True"), ("allow_pickle", "False"), ("shell", "False"))
                if keywords.get(key, safe) != safe
            ]
    return found


def test_no_source_file_of_the_product_can_run_the_content_of_a_file():
    paths = [path for name in PRODUCT for path in (ROOT / name).rglob("*.py")]
    assert len(paths) > 50
    assert {str(path.relative_to(ROOT)): uses for path in paths if (uses := unsafe_uses(path.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import dill as json",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=trusted)",
        "dcp.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "numpy.load(path, mmap_mode='r', allow_pickle=flag)",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "from os import system",
        "yaml.load(text)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_gate_finds_an_unsafe_line(source: str):
    assert len(unsafe_uses(f"def f():\n    {source}\n")) >= 1
    assert unsafe_uses("model.eval(); torch.load(path, weights_only=True); np.load(path); re.compile('a')") == []
