"""Fills in jobset.yaml.template: `render_jobset.py NAME=VALUE ... -- COMMAND ...` prints a JobSet.

gke_jobset.sh calls it on the submitting machine, so it needs only Python. Values go into the template as JSON, which is
valid YAML, so a user's value is always read as a string.
"""

import json
import sys
from pathlib import Path
from string import Template
from typing import Any

TEMPLATE = Path(__file__).with_name("jobset.yaml.template")
NUMBERS = ("slices", "hosts", "chips_per_host", "restarts", "grace", "keep_seconds")
STRINGS = ("name", "namespace", "service_account", "image")
OTHERS = ("gke_accelerator", "topology", "spot", "setup", "cache_dir")  # spot: empty or not; setup: shell code


def render(values: dict[str, str], command: list[str]) -> str:
    """The JobSet that runs `command` on every host of every slice."""
    fields: dict[str, Any] = {name: int(values[name]) for name in NUMBERS} | {name: values[name] for name in STRINGS}
    fields["node_selector"] = {
        "cloud.google.com/gke-tpu-accelerator": values["gke_accelerator"],
        "cloud.google.com/gke-tpu-topology": values["topology"],
    }
    fields["tolerations"] = [{"key": "google.com/tpu", "operator": "Exists"}]
    if values["spot"]:
        fields["node_selector"]["cloud.google.com/gke-spot"] = "true"
        fields["tolerations"].append({"key": "cloud.google.com/gke-spot", "operator": "Exists"})
    variables = {
        "STEPJAX_DISTRIBUTED": "auto" if fields["slices"] * fields["hosts"] > 1 else "",
        "JAX_COMPILATION_CACHE_DIR": values["cache_dir"],
    }
    fields["env"] = [{"name": name, "value": value} for name, value in variables.items() if value]
    # `exec` replaces the shell, so Kubernetes' SIGTERM reaches the command, which then checkpoints.
    words = ["bash", "-c", values["setup"] + ' && exec "$@"', "bash", *command]
    # Kubernetes expands $(NAME) in a command, and turns $$ into $.
    fields["command"] = [word.replace("$", "$$") for word in words]
    return Template(TEMPLATE.read_text()).substitute({name: json.dumps(value) for name, value in fields.items()})


def main(arguments: list[str]) -> int:
    dashes = arguments.index("--")
    values = dict(argument.split("=", 1) for argument in arguments[:dashes])
    expected = {*NUMBERS, *STRINGS, *OTHERS}
    if values.keys() != expected:
        print(f"render_jobset.py: missing or unknown values: {sorted(values.keys() ^ expected)}", file=sys.stderr)
        return 2
    sys.stdout.write(render(values, arguments[dashes + 1 :]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
