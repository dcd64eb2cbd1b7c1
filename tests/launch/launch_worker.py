"""A stand-in for `stepjax pretrain` in the tests of launch/: `launch_worker.py WHAT ...`, one WHAT for each process.

Each process appends a line to the file named by $EVENTS: its number, and the variables that a launcher sets. When all
have started, it does what it is told: an integer is the status to leave with, `wait` waits for a signal, `deaf` ignores
SIGTERM, `once:STATUS` leaves with that status the first time and with 0 when it is started again. On a signal it
"saves", and leaves as stepjax does.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

NAMES = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "JAX_LOCAL_DEVICE_IDS",
    "JAX_COMPILATION_CACHE_DIR",
    "STEPJAX_DISTRIBUTED",
    "LIBTPU_INIT_ARGS",
)


def record(event: str, number: int) -> None:
    fields = {
        "event": event,
        "process": number,
        "env": {name: os.environ[name] for name in NAMES if name in os.environ},
    }
    with open(os.environ["EVENTS"], "a") as events:
        events.write(json.dumps(fields) + "\n")


def main() -> int:
    number = int(os.environ.get("JAX_PROCESS_ID", "0"))
    orders = sys.argv[1:]
    order = orders[number % len(orders)]
    received = []
    if order != "deaf":
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, lambda number, _: received.append(number))
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    started_before = number in [json.loads(line)["process"] for line in read_events()]
    record("start", number)
    print(f"process {number} is here")
    print(f"process {number} complains", file=sys.stderr, flush=True)
    wait_for_peers()
    if order.startswith("once:"):
        return 0 if started_before else int(order.removeprefix("once:"))
    if order not in ("wait", "deaf"):
        return int(order)
    for _ in range(600):
        if received:
            time.sleep(0.2)  # saving takes its time, and a second signal would show by now
            record(f"saved after {received}", number)
            return 128 + received[0]
        time.sleep(0.05)
    return 99


def wait_for_peers() -> None:
    """Until the other processes of this attempt, which share its coordinator, have started too."""
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    while address and sum(address in line for line in read_events()) < int(os.environ["JAX_NUM_PROCESSES"]):
        time.sleep(0.02)


def read_events() -> list[str]:
    path = Path(os.environ["EVENTS"])
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
