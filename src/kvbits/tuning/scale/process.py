"""Names of processes that others on the same machine can check."""

from __future__ import annotations

import hashlib
import os
import socket
from functools import cache
from pathlib import Path


def process_name() -> str:
    """Return ``machine/pid/start``: no other process has it, now or later."""
    pid = os.getpid()
    return f"{_machine()}/{pid}/{_start_of(pid)}"


def is_gone(name: str) -> bool | None:
    """Whether a process has ended; None where it runs on another machine or cannot be told."""
    if name.count("/") != 2:
        return None
    machine, pid, start = name.split("/")
    if machine != _machine() or start == "0":
        return None
    return _start_of(int(pid)) != start


@cache
def _machine() -> str:
    """The host's name and what tells its boots and its containers apart, where the system says."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()
    digest = hashlib.sha256(f"{boot} {namespace}".encode()).hexdigest()
    return f"{socket.gethostname()}-{digest[:12]}"


def _start_of(pid: int) -> str:
    """When a process started, in ticks since boot; 0 where none runs or that cannot be known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "0"
    return "0" if fields[0] in "ZX" else fields[19]
