"""Create and start a container's task, in a process of its own: `python -m podferry.workload.starter REQUEST RESULT`.

containerd abandons a task whose creator hangs up, and the restore with it. So this is not the agent: once the right to run has
passed, a killed agent must not take the restoring job with it. On a Kubernetes node the kubelet stands in its place.

REQUEST is JSON: socket, namespace, id, stdio, timeout (seconds). RESULT gets `{"pid": N}` or `{"error": {...}}`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from podferry.errors import Bug, PodferryError
from podferry.fs.replacing import replace_file
from podferry.node.containerd import Containerd
from podferry.node.records import Stdio


def start(request: dict[str, Any]) -> int:
    """Have containerd create and start the task that `request` names. Returns its pid."""
    with Containerd(Path(request["socket"]), request["namespace"]) as containerd:
        container = containerd.container(request["id"])
        mounts = containerd.mounts(container.snapshotter, container.snapshot_key)
        containerd.create_task(container.id, mounts, Stdio(**request["stdio"]), timeout=request["timeout"])
        return containerd.start_task(container.id)


def main() -> None:
    """The program."""
    request, result = Path(sys.argv[1]), Path(sys.argv[2])
    answer: dict[str, Any]
    try:
        answer = {"pid": start(json.loads(request.read_text()))}
    except PodferryError as error:
        answer = {"error": error.to_dict()}
    except Exception as error:  # noqa: BLE001 - the agent must hear of it, whatever it is
        answer = {"error": Bug.because("the starter failed", error).to_dict()}
    replace_file(result, json.dumps(answer).encode())
    sys.exit("error" in answer)


if __name__ == "__main__":
    main()
