"""Running programs that a model wrote: in a container without network, or not at all."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess

SECONDS = 20
GRACE_SECONDS = 60  # to start a container
_PLACE = re.compile(r"docker:([\w][\w./:@-]*)")
_NOT_RUN = (125, 126, 127)  # docker's own failures, and a command that is not in the image


class DockerExecutor:
    """Runs Python programs in new containers of one image.

    A container has no network, no capabilities, a read-only file system but for ``/tmp``, one
    processor, 2 GiB of memory and 20 seconds.

    Args:
        place: ``docker:IMAGE``; the image has ``python`` and ``timeout``.

    Raises:
        ValueError: If it is something else, or docker is not installed.
    """

    def __init__(self, place: str) -> None:
        match = _PLACE.fullmatch(place)
        if match is None:
            raise ValueError(f"--execute-in must be docker:IMAGE, got {place!r}")
        if shutil.which("docker") is None:
            raise ValueError(
                f"--execute-in must be given where docker is installed, got {place!r} and no "
                "docker; leave it out to write answers only"
            )
        self.image = match[1]

    def check(self) -> None:
        """Run a program that does nothing.

        Raises:
            ValueError: If that fails.
        """
        if not self("pass"):
            raise ValueError(f"--execute-in must be an image that runs python, got {self.image}")

    @property
    def command(self) -> list[str]:
        """What runs a program given on standard input."""
        limits = ["--network=none", "--memory=2g", "--cpus=1", "--pids-limit=64", "--read-only"]
        rights = ["--cap-drop=ALL", "--security-opt=no-new-privileges", "--user=65534:65534"]
        run = ["docker", "run", "--rm", "--interactive", *limits, *rights, "--tmpfs=/tmp"]
        return [*run, self.image, "timeout", "--signal=KILL", str(SECONDS), "python", "-I", "-"]

    def __call__(self, program: str) -> bool:
        """Whether a program ran to its last line without an error.

        Raises:
            ValueError: If no container could be started.
        """
        token = hashlib.sha256(program.encode()).hexdigest()  # leaving early is no success
        text = f"{program}\nprint({token!r})\n"
        try:
            done = subprocess.run(
                self.command,
                input=text,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=SECONDS + GRACE_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return False
        if done.returncode in _NOT_RUN:
            reason = " ".join(done.stderr.split())[:200]
            raise ValueError(f"--execute-in must be an image that runs python, got {reason}")
        return done.returncode == 0 and done.stdout.rstrip().endswith(token)
