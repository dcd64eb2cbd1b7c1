"""One process writes in a directory; a second is refused with the first one's name, whatever ended those before."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from stepjax.directory_lock import locked
from stepjax.errors import CheckpointError

HOLDER = "import sys, time; from pathlib import Path; from stepjax.directory_lock import locked\n"
HOLDER += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        for _ in range(2):
            with (
                pytest.raises(
                    CheckpointError, match=f"run is being written by process {process.pid} on .*: wait for it"
                ),
                locked(tmp_path / "run"),
            ):
                pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / "lock").read_text().startswith(f"process {os.getpid()} on ")
    with locked(tmp_path / "run"):
        pass


def test_a_directory_that_cannot_be_made_or_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(CheckpointError, match="cannot be made or written: .*; name another --out"), locked(path):
            pass


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path):
        assert "lock: No locks available; make sure that no other process writes there" in caplog.text
