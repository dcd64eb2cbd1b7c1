"""Running a script of launch/ with stand-ins for cloud tools, and reading what it printed."""

import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

LAUNCH = Path(__file__).parents[2] / "launch"
WORKER = Path(__file__).with_name("launch_worker.py")
AWKWARD = ["stepjax", "pretrain", "it's a recipe.py", '--x="quoted" $HOME `id` $(id)', "*", "--out", "gs://b/it's"]

# Appends its name and arguments to $CALLS and its standard input, if it is told to read one, to $CALLS.stdin.
STAND_IN = """#!/bin/bash
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\n\\0'; } >>"$CALLS"
case "${0##*/}" in kubectl | sbatch) cat >>"$CALLS.stdin" ;; esac
"""


@dataclass
class Launcher:
    """Runs scripts of launch/ with stand-ins first on the PATH."""

    directory: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        (self.directory / "bin").mkdir()
        self.environment = os.environ | {
            "PATH": f"{self.directory / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CALLS": str(self.directory / "calls"),
            "EVENTS": str(self.directory / "events"),
            "TMPDIR": str(self.directory),
            "HOME": str(self.directory),
        }

    def stand_in(self, name: str, text: str = STAND_IN) -> None:
        path = self.directory / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def start(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", LAUNCH / script, *arguments],
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell that was started in the background ignores it, and so would its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = self.start(script, *arguments)
        output, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess([script, *arguments], process.returncode, output, errors)

    def printed(self, script: str, *arguments: str) -> str:
        """What --print says, which must be shell code."""
        done = self.run(script, "--print", *arguments)
        assert done.returncode == 0, done.stderr
        subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)
        return done.stdout

    def calls(self) -> list[list[str]]:
        """The stand-ins' calls so far."""
        path = self.directory / "calls"
        records = path.read_bytes().decode().split("\0\n\0") if path.exists() else []
        return [record.split("\0") for record in records if record]

    def events(self) -> list[dict]:
        """What the workers recorded."""
        path = self.directory / "events"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def commands(printed: str) -> list[list[str]]:
    """The printed commands' words, without remarks and heredocs' contents."""
    found, end = [], None
    for line in printed.splitlines():
        if end is None and line and not line.startswith("#"):
            words = shlex.split(line)
            if any(word.startswith("<<") for word in words):
                end = words.pop().removeprefix("<<")
            found.append(words)
        elif line == end:
            end = None
    return found


def heredoc(printed: str, end: str) -> str:
    """The text between <<'END' and END."""
    lines = printed.splitlines()
    first = next(number for number, line in enumerate(lines) if line.endswith(f"<<'{end}'"))
    return "\n".join(lines[first + 1 : lines.index(end)]) + "\n"
