"""What every test relies on: where Triton kernels run, how many threads, which tests a machine can run."""

import os
import signal

import torch

# Triton decides when a kernel is decorated whether it is interpreted, so this comes before any import of ours. With a
# GPU the kernels are compiled instead; TRITON_INTERPRET=1 in the environment interprets them there too.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import pytest
from hypothesis import settings

from kernels import launch

# Examples are drawn from the test's name, so that a failure is everybody's failure.
settings.register_profile("bessemer", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("bessemer")

# A suite that was started with nohup, or in the background, inherits that these are ignored, and hands it on to the
# runs that its tests tell to stop.
for _number, _handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _handler)

# Threads of small operators wait for each other more than they compute: on two busy cores, two are ten times slower.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


# Off by default, also in fixtures of modules: the interpreter is a thousand times slower than torch.
INTERPRETER_IS_THERE, launch.INTERPRETED = launch.INTERPRETED, False


@pytest.fixture(autouse=True)
def _kernels_run_where_they_are_tested(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, tests/kernels interprets kernels."""
    if "kernels" in request.path.parts[-2:]:
        monkeypatch.setattr(launch, "INTERPRETED", INTERPRETER_IS_THERE)
