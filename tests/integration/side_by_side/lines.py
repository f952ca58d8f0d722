"""The script of command lines, and how one of them is run and its answer made comparable.

A script is a text file per group of commands (``script/*.txt``).  Each line is a shell line that uses ``docker`` (or
``api``, which makes a request: ``api.py``), after one word that says what it is for:

* ``$``        its answer is compared: exit code, stdout, stderr;
* ``sorted``   the same, without regard to the order of the output's lines;
* ``tty``      the same on a terminal: every line that was ever shown, once;
* ``do``       it prepares something; its answer is not looked at;
* ``until``    it is repeated until it succeeds, and has to;
* ``differs``  it is known to be answered otherwise; why is said in docs/conformance.md.
"""

import json
import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).with_name("script")
KINDS = ("$", "sorted", "tty", "do", "until", "differs")
API_VERSION = "1.41"
"""What the recorded engine speaks.  Newer versions have other fields, which are no difference to look for here."""
UNTIL_S = 90.0
LINE_S = 60.0


@dataclass(frozen=True)
class Line:
    """One line of a script."""

    kind: str
    command: str

    @property
    def is_compared(self) -> bool:
        return self.kind in ("$", "sorted", "tty")


@dataclass(frozen=True)
class Answer:
    """What a command gave, made comparable."""

    exit: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Place:
    """Where the lines are run: which docker command, on which engine."""

    cli: str
    host: str
    address: str
    netns: str
    """Name of the engine's network namespace below /run/netns."""
    scratch: Path
    """A folder of the run's own, the working directory of its lines."""

    def environment(self) -> dict[str, str]:
        commands = self.scratch / "bin"
        commands.mkdir(exist_ok=True)
        docker = commands / "docker"
        docker.unlink(missing_ok=True)
        docker.symlink_to(self.cli)
        request = commands / "api"
        request.unlink(missing_ok=True)
        request.symlink_to(Path(__file__).with_name("api.py"))
        return {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "HOME": str(self.scratch),
            "DOCKER_HOST": self.host,
            "DOCKER_API_VERSION": API_VERSION,
            "ADDRESS": self.address,
            "NETNS": self.netns,
            "LC_ALL": "C.UTF-8",
            "TERM": "xterm",
        }


def groups() -> list[str]:
    """Names of all scripts."""
    return sorted(path.stem for path in SCRIPTS.glob("*.txt"))


def script(group: str) -> list[Line]:
    """The lines of one group.  Raises: ValueError: a line that starts with none of the known words."""
    lines = []
    for number, text in enumerate((SCRIPTS / f"{group}.txt").read_text().splitlines(), 1):
        if not text.strip() or text.startswith("#"):
            continue
        kind, _, command = text.partition(" ")
        if kind not in KINDS:
            raise ValueError(f"{group}.txt:{number}: {kind!r} is none of {', '.join(KINDS)}")
        lines.append(Line(kind, command.strip()))
    return lines


def run(line: Line, place: Place) -> Answer:
    """Run one line.  An ``until`` that does not come true in ``UNTIL_S`` seconds has the exit code of its last try."""
    deadline = time.monotonic() + UNTIL_S
    while True:
        done = _shell(line, place)
        if line.kind != "until" or done.returncode == 0 or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    shown = _ever_shown(done.stdout) if line.kind == "tty" else done.stdout
    stdout, stderr = (comparable(text, place) for text in (shown, done.stderr))
    if line.kind != "$":
        stdout, stderr = (by_line(text) for text in (stdout, stderr))
    return Answer(done.returncode, stdout, stderr)


def _shell(line: Line, place: Place) -> subprocess.CompletedProcess[str]:
    command = ["sh", "-c", line.command]
    if line.kind == "tty":
        command = ["script", "--quiet", "--return", "--echo", "never", "--command", line.command, "/dev/null"]
    return subprocess.run(
        command,
        env=place.environment(),
        cwd=place.scratch,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=LINE_S,
        check=False,
    )


_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----(\\n|\n)?", "CERTIFICATE"),
        (r"SWMTKN-1-[0-9a-z]+-[0-9a-z]+", "TOKEN"),
        (r"SWMKEY-1-[0-9A-Za-z+/]+", "KEY"),
        (r'"(CertIssuerSubject|CertIssuerPublicKey|TrustRoot)": ?"[^"]*"', r'"\1": "CERT"'),
        (r"sha256:[0-9a-f]{64}", "DIGEST"),
        (r"sha256:[0-9a-f]{12}\b", "DIGEST12"),
        (r"\b[0-9a-f]{64}\b", "ID64"),
        (r"\b(?=[0-9a-z]*[0-9])[0-9a-z]{25}\b", "ID25"),
        (r"\b(?=[0-9a-z]*[0-9])(?=[0-9a-z]*[g-z])[0-9a-z]{12}\b", "ID12"),
        (r"\b(?=[0-9a-f]*[0-9])[0-9a-f]{12}\b", "HEX12"),
        # without a digit it is an id only where ids stand
        (
            r"(?<=\.)[0-9a-z]{12}(?=@)|(?m:^)[0-9a-z]{12}(?=[ :]|\n|\Z)|(?<=\"ID\":\")[0-9a-z]{12}(?=\")",
            "ID12",
        ),
        (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?( ?(Z|[+-]\d\d:?\d\d)( UTC)?)?", "TIME"),
        (r"(([Ll]ess than|About) )*(an?|\d+) (second|minute|hour|day|week|month|year)s?( ago)?", "AGO"),
        (r"\b\d{10}\.\d{9}\b", "TIME"),
        (r'"time":\d+,"timeNano":\d+', '"time":N'),
        (r'"HeartbeatPeriod": ?1000000000\b', '"HeartbeatPeriod":5000000000'),
        (r"(Issuer (Subject|Public Key):\s+)\S+", r"\1CERT"),
        (r'"Index": ?\d+', '"Index": N'),
        (r'"(Merged|Upper|Work)Dir": "[^"]*"', r'"\1Dir": "PATH"'),
        (r'"NanoCPUs": ?\d+,"MemoryBytes": ?\d{10,}', '"NanoCPUs":N,"MemoryBytes":N'),  # the machine's
        (r'"Pid": ?[1-9]\d*', '"Pid": N'),
        (r"\b\d+(\.\d+)? ?([kKMGT]i?)?B\b", "SIZE"),
        (r"\b\d+\.\d+%", "PERCENT"),
    )
)


def comparable(text: str, place: Place) -> str:
    """``text`` without what differs from run to run: ids, digests, times, sizes, addresses, widths of columns."""
    text = (
        text.replace("\r\n", "\n")
        .replace("^@", "")
        .replace(place.address, "ADDRESS")
        .replace(str(place.scratch), "SCRATCH")
    )
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    try:
        text = json.dumps(json.loads(text), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    except ValueError:
        text = re.sub(r" {2,}(?=\S)", "  ", text)
    return re.sub(r" +$", "", text, flags=re.MULTILINE)


def by_line(text: str) -> str:
    """``text`` without the order of its lines."""
    return "".join(sorted(text.splitlines(keepends=True)))


def _ever_shown(text: str) -> str:
    """What a terminal showed, without the order and number of repaints and what may be too short to be seen."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[78]", "\n", text).replace("\r", "\n").replace("^@", "")
    lines = (re.sub(r"\[[=> ]*\]", "[BAR]", line).strip() for line in plain.splitlines())
    return "".join(
        f"{line}\n" for line in sorted({line for line in lines if line and not _PASSING.match(line)})
    )


_PASSING = re.compile(
    r"[\w/]+: *(|new|pending|assigned|accepted|preparing|ready|starting) *(\[BAR\])?$"
    r"|verify: Waiting|overall progress: "
)
