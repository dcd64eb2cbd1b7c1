"""Dependencies point one way: a room imports only what stands below it, and nothing heavy happens at import."""

import ast
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "stepjax"
KERNELS = PACKAGE.parent / "pallas_kernels"

# Checkpoints are a room of their own, below: interop reads them, and training starts from what interop reads.
CHECKPOINT = {("training", "checkpoint"), ("training", "digests")}
# So are the layers that the model's parts share: the codec is made of them, and the model has a codec.
LAYERS = {("models", "layers"), ("models", "lora")}

# Room -> the rooms it may import. Files directly in the package are rooms of their own name.
ALLOWED = {
    "errors": set(),
    "figures": set(),
    "progress": {"figures"},
    "stop_signals": set(),
    "directory_lock": {"errors"},
    "config": {"errors"},
    "config_file": {"errors", "config"},
    "sharding": {"errors", "config"},
    "chips": {"pallas_kernels"},
    "distributed": {"errors"},
    "xla_flags": {"errors"},
    "web": set(),
    "processing": {"errors", "config"},
    "data": {"errors", "config", "processing"},
    "layers": {"errors", "config", "sharding"},
    "tofc": {"errors", "config", "processing", "layers"},
    "models": {"errors", "config", "sharding", "layers", "tofc", "pallas_kernels"},
    "checkpoint": {"errors", "sharding"},
    "interop": {
        *("errors", "figures", "config", "config_file", "sharding", "models", "processing", "checkpoint", "inference"),
        *("progress", "directory_lock", "tofc"),
    },
    "inference": {"errors", "config", "sharding", "models", "processing", "pallas_kernels"},
    "training": {
        *("errors", "figures", "chips", "config", "config_file", "sharding", "distributed", "models", "data"),
        *("processing", "pallas_kernels", "checkpoint", "interop", "directory_lock", "progress", "tofc"),
    },
    "planning": {
        *("errors", "config", "config_file", "sharding", "models", "data", "processing", "training", "xla_flags"),
        *("pallas_kernels", "inference", "figures", "chips", "interop", "post_training"),
    },
    "rollouts": {"errors", "processing", "inference", "interop"},
    "tasks": {"errors", "processing"},
    "rewards": {"errors", "data", "processing", "inference", "rollouts", "tasks"},
    "evaluation": {
        *("errors", "figures", "config", "sharding", "models", "data", "processing", "inference", "training"),
        *("progress", "rollouts", "tasks", "rewards", "tofc", "interop", "web"),
    },
    "post_training": {
        *("errors", "figures", "config", "config_file", "sharding", "distributed", "models", "data", "processing"),
        *("training", "checkpoint", "interop", "inference", "rollouts", "rewards", "evaluation", "progress", "pacore"),
    },
    "pacore": {
        *("rollouts", "errors", "figures", "directory_lock", "processing", "inference", "interop", "progress"),
        *("web", "tasks"),
    },
    "serving": {
        *("rollouts", "errors", "figures", "config", "sharding", "processing", "inference", "interop", "pacore", "web"),
        "tofc",
    },
    "cli": None,  # the top: may import all
}


def rooms_imported(path: Path) -> set[str]:
    """The rooms of the package that a file imports, and the kernels as a room of their own name."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "stepjax":
                names = [f"stepjax.{alias.name}" for alias in node.names]
        else:
            continue
        for package, *rest in (name.split(".") for name in names):
            if package == KERNELS.name:
                rooms.add(package)
            elif package == PACKAGE.name and rest:
                rooms.add(room_named(rest))
    return rooms


def room_named(parts: Sequence[str]) -> str:
    if parts[-1].endswith("command"):  # commands stand at the top, whichever room's they are
        return "cli"
    special = {"checkpoint": CHECKPOINT, "layers": LAYERS}
    return next((room for room, files in special.items() if tuple(parts[:2]) in files), parts[0])


def room_of(path: Path) -> str:
    return room_named(path.relative_to(PACKAGE).with_suffix("").parts)


# `assets` holds what is shipped and never imported, such as the PyTorch files of an exported model.
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if room_of(path) not in ("__init__", "assets")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = room_of(path)
    assert room in ALLOWED, f"{room} has no place in the order yet: add it to ALLOWED and to CONTRIBUTING.md"
    allowed = ALLOWED[room]
    if allowed is not None:
        assert rooms_imported(path) - {room} <= allowed


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: str(path.relative_to(KERNELS)))
def test_the_kernels_know_nothing_of_stepjax(path):
    assert rooms_imported(path) <= {KERNELS.name}


def test_the_order_has_no_cycle():
    done = {KERNELS.name}
    waiting = {room: set(allowed) for room, allowed in ALLOWED.items() if allowed is not None}
    while waiting:
        ready = [room for room, allowed in waiting.items() if allowed <= done]
        assert ready, f"a cycle among {sorted(waiting)}"
        done |= set(ready)
        for room in ready:
            del waiting[room]


def test_any_module_may_be_the_first_to_be_imported():
    """In one process, with the package forgotten before each: a process each would take minutes."""
    code = """if True:
        import importlib, sys
        for name in sys.argv[1:]:
            for known in [known for known in sys.modules if known.partition(".")[0] == "stepjax"]:
                del sys.modules[known]
            importlib.import_module(name)
    """
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in FILES]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


def test_only_sharding_names_mesh_axes():
    for path in FILES:
        if path.name in ("sharding.py", "config.py"):
            continue
        strings = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not strings & {"fsdp", "tensor"}, path


def test_importing_the_package_neither_starts_jax_nor_reaches_out():
    code = "import sys, stepjax, stepjax.config, stepjax.cli; assert 'jax' not in sys.modules, 'jax was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
