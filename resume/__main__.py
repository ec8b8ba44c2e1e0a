"""Looks into a run's data and changes it, on a stopped run or on a running one.

    python -m resume status RUN                       where the run stands, and what was decided so far
    python -m resume plan RUN [--steps N]             when epochs begin and when each source runs out
    python -m resume append RUN PATH... [--weights "web=0.5 code=0.5"]
    python -m resume remove RUN FILE...               what is unseen of them is never trained
    python -m resume skip RUN --steps N [--for-good]  passes over the data of the next N steps, after a loss spike
    python -m resume requeue RUN                      what was skipped comes back now, not at the end of the epoch
    python -m resume reweight RUN "web=0.5 code=0.5" [--from-tokens 20e9]
    python -m resume audit RUN [FILE...] [--sample I] [--bitmap OUT.npz]
    python -m resume verify RUN [--level full]        every file and every checkpoint

A change is queued in RUN/requests. The run takes it up when it starts again or at its next checkpoint, and says so in
its log. FILE is a path, a file name, or an identity.
Exit codes: 0 done; 65 bad data, or books or files that are not as they should be; 73 cannot write; 78 a request that
does not fit the run.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from resume.verify import LEVELS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    arguments = _parser().parse_args(argv)
    from resume.commands import run_command  # --help and a mistyped flag should not wait for torch

    return run_command(arguments)


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m resume", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary)
        added.add_argument("run", metavar="RUN", type=Path, help="run folder")
        added.set_defaults(command=name)
        return added

    for name, summary in (
        ("status", "Shows where the run stands in its data, and what was decided so far."),
        ("plan", "Shows when epochs begin and when each source runs out."),
        ("audit", "Shows which samples were trained and holds the books against the order."),
        ("verify", "Checks every file and every checkpoint."),
    ):
        added = add(name, summary)
        added.add_argument("--json", action="store_true", help="print JSON instead of tables")
        if name == "plan":
            added.add_argument("--steps", type=int, help="up to this step; by default the run's last")
        if name == "verify":
            added.add_argument("--level", choices=LEVELS, default="full", help="how closely files are looked at")
        if name == "audit":
            added.add_argument("files", metavar="FILE", nargs="*", help="all epochs of these files, sample by sample")
            added.add_argument("--sample", type=int, help="with FILE: only this sample")
            added.add_argument("--bitmap", type=Path, help="write how often each sample was trained to this .npz file")
    added = add("append", "Adds shards to what is unseen; they mix evenly with what is left.")
    added.add_argument("paths", metavar="PATH", nargs="+", type=Path, help="data folder or shard")
    added.add_argument("--source", help="the source they belong to; by default what their manifest says")
    added.add_argument("--weights", help='new weights of all sources, which a new source wants: "web=0.5 code=0.5"')
    added = add("remove", "Takes files out of what is unseen, for good.")
    added.add_argument("files", metavar="FILE", nargs="+", help="path, file name or identity")
    added = add("skip", "Passes over the data of the next steps.")
    added.add_argument("--steps", type=int, required=True, help="how many steps")
    added.add_argument("--for-good", action="store_true", help="never train it; by default it returns in this epoch")
    add("requeue", "Has what was skipped come back now.")
    added = add("reweight", "Changes the weights of the sources.")
    added.add_argument("weights", metavar="WEIGHTS", help='of all sources: "web=0.5 code=0.5"')
    added.add_argument("--from-tokens", type=float, help="from this number of tokens on; by default from now")
    return parser


if __name__ == "__main__":
    sys.exit(main())
