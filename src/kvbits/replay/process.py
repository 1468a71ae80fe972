"""The caller's side of a policy's process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import TracebackType
from typing import Any, Self

from kvbits.errors import PolicyError
from kvbits.replay.hooks import HOOKS, checked, place


class PolicyProcess:
    """A policy in a process of its own; use as a context manager.

    Arguments are copied into it as JSON, so it can change nothing here. Its hashes and its random
    numbers start from the seed: the same policy answers the same way every time.

    Args:
        source: ``FILE.py``, ``FILE.py:CLASS``, a plan file or the name of a built-in policy.
        seed: Seed of Python's ``random`` there.

    Raises:
        PolicyError: If the policy cannot be loaded.
    """

    def __init__(self, source: str, seed: int = 0) -> None:
        self._process = subprocess.Popen(
            # -P: a file called json.py beside the policy must not stand in for the library's
            [sys.executable, "-P", "-m", "kvbits.replay.worker", source, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": str(seed % 2**32)},
        )
        try:
            reply = self._read(f"{source} must load")
            if "error" in reply:
                raise PolicyError(f"{source} must load, got {reply['error']}")
        except BaseException:
            self.close()
            raise
        self.class_name: str = reply["value"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def ask(
        self,
        hook: str,
        *arguments: Any,
        layer_id: int | None = None,
        kv_kind: str | None = None,
    ) -> Any:
        """Call a hook and check what it returns; layer and kind, where given, come first.

        Raises:
            PolicyError: If the hook raises, or returns what it must not.
        """
        named = [each for each in (layer_id, kv_kind) if each is not None]
        where = place(hook, layer_id, kv_kind)
        line = json.dumps({"hook": hook, "arguments": [*named, *arguments]})
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PolicyError(f"{where} must return, got the end of its process") from None
        reply = self._read(f"{where} must return")
        if "error" in reply:
            raise PolicyError(f"{where} must not raise, got {reply['error']}")
        if "unknown" in reply:
            raise PolicyError(f"{where} must return {HOOKS[hook].rule}, got {reply['unknown']}")
        return checked(hook, reply["value"], layer_id, kv_kind)

    def _read(self, what: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PolicyError(f"{what}, got the end of its process")
        return dict(json.loads(line))
