"""What a result must name to mean anything: the device and the versions it was measured with."""

import json
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def describe() -> dict[str, Any]:
    """Device, driver, versions and commit."""
    return {
        "device": device_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "driver": _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "flash_attn": _version("flash_attn"),
        "commit": _command("git", "rev-parse", "--short", "HEAD"),
    }


def device_name() -> str:
    """The GPU's name, or the CPU's model and core count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def result_path(benchmark: str, suffix: str, folder: Path | None = None) -> Path:
    """<folder>/<device>-<benchmark>.<suffix>; benchmarks/results if there is no folder."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    return (folder or RESULTS) / f"{slug}-{benchmark}.{suffix}"


def write_result(
    benchmark: str, command: str, rows: list[dict[str, Any]], folder: Path | None = None, **facts: Any
) -> Path:
    """Writes rows and environment as JSON and returns the path."""
    path = result_path(benchmark, "json", folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"command": command, "environment": describe(), **facts, "rows": rows}
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _command(*arguments: str) -> str:
    try:
        result = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "absent"
    return result.stdout.strip()
