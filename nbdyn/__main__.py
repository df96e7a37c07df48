"""`python -m nbdyn`: the demo, and the care of runs (doctor, verify, gc, compact, index)."""

from __future__ import annotations

import argparse
import sys

from nbdyn.errors import NbdynError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m nbdyn", description="Record and study how networks train.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train an MLP on handwritten digits, record it, answer the five questions")
    demo.add_argument("--folder", default="nbdyn-demo", help="where runs and picture go (default: %(default)s)")
    demo.add_argument("--epochs", type=int, default=6, help="passes over the data (default: %(default)s)")
    for name, text in (
        ("verify", "read every byte of a run and check that its parts agree"),
        ("gc", "remove what a killed writer left behind"),
        ("compact", "compress what a killed recording left raw of single samples"),
        ("index", "build the indexes of a run, or what they lack: they make statements over whole epochs fast"),
        ("doctor", "versions, and what may be wrong with this installation or a run"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("path", nargs="?" if name == "doctor" else None, help="the run")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except NbdynError as error:
        print(f"nbdyn: {error}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    if options.command == "demo":
        from nbdyn.demo import demo

        demo(options.folder, options.epochs)
        return 0
    if options.command == "doctor":
        from nbdyn.doctor import doctor

        print(doctor(options.path))
        return 0
    from nbdyn.store import verify

    if options.command == "gc":
        removed = verify.gc(options.path)
        print(f"removed {len(removed)} fragments." if len(removed) else "nothing to remove.")
        if len(removed):
            print(removed.to_string(index=False))
        return 0
    if options.command == "compact":
        from nbdyn.recording import compact

        print(f"{compact(options.path)}.")
        return 0
    if options.command == "index":
        from nbdyn.recording import index

        print(f"{index(options.path)}.")
        return 0
    findings = verify.verify(options.path)
    if len(findings):
        print(findings.to_string(index=False))
        return 1
    from nbdyn.store import Store

    print(f"{options.path} is whole: {Store(options.path).steps_committed:,} steps.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
