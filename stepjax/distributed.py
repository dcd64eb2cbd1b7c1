"""Multi-process runs: how a process joins the others, and how it exits when one of them is lost.

Every process runs the same command. It joins the others if the environment says where they are,

    JAX_COORDINATOR_ADDRESS=host:port  JAX_NUM_PROCESSES=4  JAX_PROCESS_ID=0

or if STEPJAX_DISTRIBUTED=auto lets JAX find out (Cloud TPU pods, GKE, Slurm, MPI). Otherwise it runs alone.

When a process falls silent, JAX's coordination service aborts all others from C++, with a stack dump and a SIGABRT that
Python code cannot catch. So training runs in a child process, and its parent, `supervise`, turns the abort into one
line and the exit status TRY_AGAIN.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from stepjax.errors import ConfigError

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: another process was lost; rerun the same command to resume

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SUPERVISED = "STEPJAX_SUPERVISED"
_REMEDY = "Rerun the same command on every machine to resume from the last checkpoint"


def is_distributed(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment names other processes.

    Raises:
        ConfigError: it names them incompletely.
    """
    automatic = environment.get("STEPJAX_DISTRIBUTED", "")
    if automatic not in ("", "0", "auto"):
        raise ConfigError(f"STEPJAX_DISTRIBUTED={automatic}: must be auto, or unset")
    present = [name for name in _VARIABLES if environment.get(name)]
    # JAX's own detection may need only the coordinator's address.
    if 0 < len(present) < len(_VARIABLES) and automatic != "auto":
        missing = [name for name in _VARIABLES if name not in present]
        raise ConfigError(f"{', '.join(present)} set without {', '.join(missing)}: set all three, or none")
    return automatic == "auto" or len(present) == len(_VARIABLES)


def initialize(lost_after: float) -> None:
    """Joins the other processes, if any. Call it before anything asks JAX for devices.

    Args:
        lost_after: seconds of silence after which a process counts as lost and the others exit.

    Raises:
        ConfigError: the environment is contradictory, or the other processes cannot be reached.
    """
    if not is_distributed():
        return
    import jax

    address, *numbers = (os.environ.get(name) for name in _VARIABLES)
    seconds = max(1, round(lost_after))
    try:
        if all(numbers):
            count, index = (int(number or "") for number in numbers)
            jax.distributed.initialize(
                address, count, index, cluster_detection_method="deactivate", heartbeat_timeout_seconds=seconds
            )
        else:
            jax.distributed.initialize(heartbeat_timeout_seconds=seconds)
    except (ValueError, RuntimeError) as error:
        values = " ".join(f"{name}={os.environ.get(name, '')}" for name in _VARIABLES)
        raise ConfigError(f"cannot join the other processes ({values}): {str(error).splitlines()[0]}") from error


def must_supervise() -> bool:
    """Whether this process should leave the training to a child."""
    return _SUPERVISED not in os.environ and is_distributed()


def supervise(arguments: Sequence[str]) -> int:
    """Runs `stepjax ARGUMENTS` in a child process, forwards SIGTERM and SIGINT, and returns the exit status."""
    # In its own session the child does not get the terminal's Ctrl-C a second time.
    child = subprocess.Popen(
        [sys.executable, "-m", "stepjax.cli", *arguments],
        env=os.environ | {_SUPERVISED: "1"},
        start_new_session=True,
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: child.send_signal(received))
    status = child.wait()
    if status >= 0:
        return status
    if -status == signal.SIGABRT:
        print(f"stepjax: another process ended or cannot be reached (see above). {_REMEDY}", file=sys.stderr)
        return TRY_AGAIN
    print(f"stepjax: {signal.Signals(-status).name} ended the training process. {_REMEDY}", file=sys.stderr)
    return 128 - status


def leave(message: str) -> None:
    """Exits at once with TRY_AGAIN: a collective that waits for a lost process cannot be interrupted."""
    print(f"stepjax: {message}. {_REMEDY}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(TRY_AGAIN)


def _die_with_parent() -> None:
    """Linux: when the parent dies, even by SIGKILL, the kernel kills the child too."""
    parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
