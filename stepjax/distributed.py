"""Runs of several processes: how one joins, and how it ends when another has died.

Every process runs the same command. It joins the others if told where they are,

    JAX_COORDINATOR_ADDRESS=host:port  JAX_NUM_PROCESSES=4  JAX_PROCESS_ID=0

or if STEPJAX_DISTRIBUTED=auto says that JAX can find out by itself (Cloud TPU pods, GKE, Slurm, MPI). Otherwise it runs
alone.

When the coordinator dies, JAX's runtime aborts the other processes from C++ with a stack dump that no Python code can
catch. So each trains in a child process, and its parent, `supervise`, turns such an end into one line and the exit
status TRY_AGAIN.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from stepjax.errors import ConfigError

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: another process was lost; the same command goes on from the checkpoint

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SUPERVISED = "STEPJAX_SUPERVISED"
_SAY_AGAIN = "run the same command again on every machine to go on from the last checkpoint"


def is_distributed(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment says that there are other processes.

    Raises:
        ConfigError: it says so in part.
    """
    automatic = environment.get("STEPJAX_DISTRIBUTED", "")
    if automatic not in ("", "0", "auto"):
        raise ConfigError(f"STEPJAX_DISTRIBUTED={automatic}: must be auto, or not be set")
    present = [name for name in _VARIABLES if environment.get(name)]
    # A coordinator's address alone may be there for JAX's own detection to use.
    if 0 < len(present) < len(_VARIABLES) and automatic != "auto":
        missing = [name for name in _VARIABLES if name not in present]
        raise ConfigError(f"{', '.join(present)} set without {', '.join(missing)}: set all three, or none")
    return automatic == "auto" or len(present) == len(_VARIABLES)


def initialize() -> None:
    """Join the other processes, if there are any. Call it before anything asks JAX for devices.

    Raises:
        ConfigError: the environment is contradictory, or the others cannot be reached.
    """
    if not is_distributed():
        return
    import jax

    address, *numbers = (os.environ.get(name) for name in _VARIABLES)
    try:
        if all(numbers):
            count, index = (int(number or "") for number in numbers)
            jax.distributed.initialize(address, count, index, cluster_detection_method="deactivate")
        else:
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        values = " ".join(f"{name}={os.environ.get(name, '')}" for name in _VARIABLES)
        raise ConfigError(f"cannot join the other processes ({values}): {str(error).splitlines()[0]}") from error


def must_supervise() -> bool:
    """Whether this process is to leave the training to a child of its own."""
    return _SUPERVISED not in os.environ and is_distributed()


def supervise(arguments: Sequence[str]) -> int:
    """Run `stepjax ARGUMENTS` in a child, hand it SIGTERM and SIGINT, and return a status that says what to do."""
    # A session of its own keeps the terminal's Ctrl-C from reaching the child twice.
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
    name = signal.Signals(-status).name
    if -status == signal.SIGABRT:
        print(
            f"stepjax: another process ended, or cannot be reached any more (see above); {_SAY_AGAIN}", file=sys.stderr
        )
        return TRY_AGAIN
    print(f"stepjax: the training process was ended by {name}; {_SAY_AGAIN}", file=sys.stderr)
    return 128 - status


def leave(message: str) -> None:
    """End this process at once with TRY_AGAIN: a collective that waits for the dead cannot be interrupted."""
    print(f"stepjax: {message}; {_SAY_AGAIN}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(TRY_AGAIN)


def _die_with_parent() -> None:
    """Linux: whoever kills the parent, without a chance to tell, kills the child."""
    parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
