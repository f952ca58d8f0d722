"""All network results in one run, with their limits: ``make bench-networks``.

::

    .venv/bin/python -m bench.networks                          # results/<date>-<time>-<commit>-networks.{json,md}
    .venv/bin/python -m bench.networks --pairs 2 --parts mesh,names --dry

The parts run one after another, each in a separate process, so that none measures memory left by another.  A part that
fails or takes too long is interrupted, cleans up after itself, and is named in the result.  The others continue.  The
exit status is 1 if a result missed its limit or a part failed.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

import msgspec

from bench.figures import PAIRS, Figure, document, keep
from bench.run import commit

TITLE = "Networks"
PARTS = {
    "overlay": 240,
    "overlay_beside": 300,
    "overlay_services": 600,
    "overlay_changes": 480,
    "virtual": 240,
    "names": 180,
    "mesh": 180,
    "encrypted": 180,
}
"""Time limit in seconds for each part (a module of this folder), several times its duration on a quiet machine."""
_CLEAN_UP_S = 240.0


def main() -> None:
    """Measure, print and keep."""
    options = _options()
    if options.part:
        _be_part(options.part, options.pairs, Path(options.into))
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up after SIGTERM as well
    now, began = datetime.now(UTC), time.monotonic()
    figures: list[Figure] = []
    notes: list[str] = []
    for part in options.parts:
        part_began = time.monotonic()
        found, note = _measured(part, options.pairs)
        figures += found
        notes += [note] if note else []
        _say(f"{part}: {time.monotonic() - part_began:.0f} s{', ' + note if note else ''}")
    figures.sort(key=lambda one: one.number or len(PARTS) * 100)
    failed = len(notes)
    notes.append(f"{options.pairs} pairs; all of it took {(time.monotonic() - began) / 60:.1f} minutes.")
    print(document(TITLE, now, commit(), figures, notes))
    if not options.dry:
        keep(TITLE, "networks", now, figures, notes)
    if failed or any(one.holds is False for one in figures):
        raise SystemExit(1)


def _measured(part: str, pairs: int) -> tuple[list[Figure], str]:
    """Measure a part in a separate process.  Return its results, and its error if any."""
    with tempfile.TemporaryDirectory(prefix="skep-bench-") as directory:
        into = Path(directory, "figures.json")
        words = ["--part", part, "--pairs", str(pairs), "--into", str(into)]
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.networks", *words], stdout=sys.stderr, start_new_session=True
        )
        note = ""
        try:
            if process.wait(PARTS[part]):
                note = f"{part} failed ({process.returncode})"
        except subprocess.TimeoutExpired:
            note = f"{part} took longer than {PARTS[part]} s"
        finally:
            _end(process)
        if not into.exists():
            return [], note or f"{part} gave nothing"
        return msgspec.json.decode(into.read_bytes(), type=list[Figure]), note


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the process so that it cleans up, if it still runs.  Then kill the rest."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_CLEAN_UP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _be_part(part: str, pairs: int, into: Path) -> None:
    """Run one part, in its own process."""
    measure = import_module(f"bench.{part}").figures
    into.write_bytes(msgspec.json.encode(measure(pairs)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.networks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"of everything (default {PAIRS})")
    parser.add_argument(
        "--parts",
        type=lambda text: text.split(","),
        default=list(PARTS),
        help=f"comma-separated: {', '.join(PARTS)}",
    )
    parser.add_argument("--dry", action="store_true", help="keep no result")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--into", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"unknown part {', '.join(unknown)}; known: {', '.join(PARTS)}")
    if shutil.which("dockerd", path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
        parser.error("no dockerd found, beside which some figures are measured: apt-get install docker.io")
    return options


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
