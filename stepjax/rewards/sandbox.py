"""Runs an untrusted Python program confined: no network, no files but the system's, limits on everything it uses.

With `bwrap` where it is installed, else with `unshare`: namespaces of its own for processes, network, mounts, IPC and
host name, a root that holds the system's directories read-only and a small /tmp in memory, no privileges, and resource
limits. Programs started by root run as a user without a name. All its processes end with it, or at the deadline.

It shares the kernel, so it confines what models write by mistake or for a reward, not an attacker with a kernel bug.
"""

import dataclasses
import functools
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Literal

from stepjax.errors import ConfigError

MEMORY = 512 << 20  # bytes of each process
OUTPUT = 1 << 20  # bytes
FILES = 16 << 20  # bytes, of all files together
PROCESSES = 16

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null")
_ROOTS = ("/mnt", "/media", "/srv", "/tmp")  # where the new root may be mounted, unseen by others
_SETUP = """
set -e
umask 022
root=$1
shift
mount -t tmpfs -o size=$1,nr_inodes=5k,mode=755,nosuid,nodev tmpfs "$root"
shift
while [ "$1" != -- ]; do
    if [ -d "$1" ]; then mkdir -p "$root$1"; else mkdir -p "$root$(dirname "$1")"; touch "$root$1"; fi
    mount --rbind "$1" "$root$1"
    mount -o remount,bind,ro "$root$1"
    shift
done
shift
mkdir -m 1777 "$root/tmp"
set +e
chroot "$root" "$@"
exit $?
"""
# Process 1 is the shell above, which the program cannot signal: ending it ends every process of the program. Leaving a
# chroot takes a privilege, and setpriv drops them all.

_CHECK = """
import os, socket
names = {name for _, name in socket.if_nameindex()}
try:
    open("/usr/stepjax", "w")
except OSError:
    if names <= {"lo"} and os.getppid() == 1 and not os.path.exists("/sys"):
        open("/tmp/a", "w").write("a")
        print("confined")
"""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """
    Attributes:
        status: of the process; negative for a signal.
        output: what it wrote to stdout.
        exceeded: the limit that ended it, if one did. "clock" does not say whose fault it was.
    """

    status: int
    output: bytes
    exceeded: Literal["cpu", "clock", "output"] | None = None


def run(source: str, given: bytes = b"", *, seconds: float, clock: float) -> Outcome:
    """
    Args:
        source: of the program, which runs as `__main__`, with the standard library only.
        given: its stdin.
        seconds: CPU time of each process.
        clock: seconds by the clock.

    Raises:
        ConfigError: this machine cannot confine it.
    """
    return _run(_backend(), source, given, seconds, clock)


@functools.cache
def _backend() -> Literal["bwrap", "unshare"]:
    """
    Raises:
        ConfigError: neither works.
    """
    reasons = []
    for backend in ("bwrap", "unshare"):
        missing = [tool for tool in (backend, "prlimit", "setpriv") if shutil.which(tool) is None]
        if missing:
            reasons.append(f"{missing[0]} is not installed")
            continue
        with tempfile.TemporaryFile() as errors:
            outcome = _run(backend, _CHECK, b"", 20.0, 60.0, errors.fileno())
            if outcome.status == 0 and outcome.output == b"confined\n":
                return backend
            errors.seek(0)
            told = errors.read(1000).decode("utf-8", "replace").strip().splitlines()
        reasons.append(f"{backend} fails: {told[-1] if told else f'status {outcome.status}'}")
    raise ConfigError(
        f"reward 'code' runs no program unconfined, and nothing here confines one: {'; '.join(reasons)}. Install "
        "bubblewrap and util-linux; in a container, run as root with the capability SYS_ADMIN, or as another user with "
        "user namespaces allowed (docker: --security-opt seccomp=unconfined)"
    )


def _run(
    backend: str, source: str, given: bytes, seconds: float, clock: float, errors: int = subprocess.DEVNULL
) -> Outcome:
    with tempfile.TemporaryFile() as program, tempfile.TemporaryFile() as stdin:
        for file, content in ((program, source.encode("utf-8", "replace")), (stdin, given)):
            file.write(content)
            file.seek(0)
        descriptor = program.fileno()
        process = subprocess.Popen(
            _command(backend, descriptor, seconds),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=errors,
            pass_fds=[descriptor],
            env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8", "HOME": "/tmp"},
            cwd="/",
            start_new_session=True,
        )
    output, exceeded = bytearray(), None
    try:
        for part in _parts(process, time.monotonic() + clock):
            if part is None:
                exceeded = "clock"
            else:
                output += part
                exceeded = "output" if len(output) > OUTPUT else None
            if exceeded:
                break
    finally:
        _end(process)
    if exceeded is None and process.returncode in (-signal.SIGXCPU, 128 + signal.SIGXCPU, 128 + signal.SIGKILL):
        exceeded = "cpu"
    return Outcome(process.returncode, bytes(output[:OUTPUT]), exceeded)


def _parts(process: subprocess.Popen[bytes], deadline: float) -> Iterator[bytes | None]:
    """The output as it comes, then None if the deadline passes before its end."""
    assert process.stdout is not None
    while (left := deadline - time.monotonic()) > 0:
        if select.select([process.stdout], [], [], left)[0]:
            part = os.read(process.stdout.fileno(), 1 << 16)
            if part:
                yield part
                continue
            try:  # closed, but perhaps not ended
                process.wait(max(0.0, deadline - time.monotonic()))
                return
            except subprocess.TimeoutExpired:
                break
    yield None


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def _command(backend: str, descriptor: int, seconds: float) -> list[str]:
    is_root = os.geteuid() == 0
    user = random.randrange(20_000, 60_000)  # of its own, so that its processes are counted alone
    python = os.path.realpath(sys.executable)
    read = f"import os; os.chdir('/tmp'); exec(compile(os.fdopen({descriptor}, 'rb').read(), 'program', 'exec'))"
    inner = [
        *("prlimit", f"--cpu={max(1, round(seconds))}", f"--as={MEMORY}", f"--fsize={FILES}", f"--nproc={PROCESSES}"),
        *("--nofile=64", "--core=0", "--"),
        *("setpriv", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"),
        *((f"--reuid={user}", f"--regid={user}", "--clear-groups") if is_root else ()),
        *("--", python, "-I", "-S", "-B", "-c", read),
    ]
    shown = _shown()
    if backend == "bwrap":
        # Root keeps what it takes to become another user; setpriv drops it.
        scope = ("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--cap-add", "ALL")
        return [
            *("bwrap", "--die-with-parent", "--new-session"),
            *(scope if is_root else ("--unshare-all",)),
            *(word for path in shown if path != "/dev/null" for word in ("--ro-bind", path, path)),
            *("--dev", "/dev", "--perms", "1777", "--size", str(FILES), "--tmpfs", "/tmp", "--"),
            *inner,
        ]
    root = next(each for each in _ROOTS if os.path.isdir(each) and not any(path.startswith(each) for path in shown))
    return [
        *("unshare", *(() if is_root else ("--user", "--map-root-user"))),
        *("--net", "--pid", "--mount", "--ipc", "--uts", "--fork", "--kill-child", "--"),
        *("sh", "-c", _SETUP, "sh", root, str(FILES), *shown, "--", *inner),
    ]


def _shown() -> list[str]:
    """The paths that the program can read."""
    prefix = os.path.realpath(sys.base_prefix)
    paths = [path for path in _SYSTEM if os.path.exists(path)]
    return paths if prefix.startswith("/usr") else [*paths, prefix]
