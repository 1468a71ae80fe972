"""The process a policy runs in: loads one policy and answers calls of its hooks, line by line.

Lines are JSON. A policy here has numbers and strings and nothing else of the run: model, tokenizer
and tensors are in another process. What it prints goes to stderr, so that it cannot pass for
output of the run.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import random
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from kvbits.replay.hooks import CORE_HOOKS
from kvbits.replay.policy import AdaptiveQuantPolicy

NAME = AdaptiveQuantPolicy.__name__


def load(source: str) -> Any:
    """Make the policy that ``source`` names: ``FILE.py``, ``FILE.py:CLASS``, or a built-in name.

    Raises:
        ValueError: If there is no such policy, or it lacks a core hook.
    """
    file, _, name = source.partition(":")
    if not file.endswith(".py"):
        return _built_in(source)
    policy = _class_of(_module(Path(file)), name)()
    missing = [hook for hook in CORE_HOOKS if not callable(getattr(policy, hook, None))]
    if missing:
        raise ValueError(f"{source} must have the core hook {missing[0]}, got none")
    return policy


def _built_in(source: str) -> Any:
    from kvbits.replay import baselines

    if source.endswith(".json"):
        return baselines.TunedPlan(source)
    if source not in baselines.BUILT_IN:
        known = ", ".join(baselines.BUILT_IN)
        raise ValueError(
            f"POLICY must be a .py file, a plan .json or one of {known}; got {source}"
        )
    return baselines.BUILT_IN[source]()


def _module(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"POLICY must be an existing file, got {path}")
    spec = importlib.util.spec_from_file_location("replayed_policy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _class_of(module: ModuleType, name: str) -> type:
    """The class of that name, or the only one of the file that is a policy, by base or name."""
    own = [
        found
        for found in vars(module).values()
        if inspect.isclass(found)
        and found.__module__ == module.__name__
        and (issubclass(found, AdaptiveQuantPolicy) or found.__name__ == NAME)
    ]
    if name:
        own = [found for found in own if found.__name__ == name]
    if len(own) != 1:
        names = ", ".join(found.__name__ for found in own) or "none"
        raise ValueError(
            f"POLICY must define one subclass of {NAME}{f' called {name}' if name else ''}, "
            f"got {names}; name one as FILE.py:CLASS"
        )
    return own[0]


def plain(value: Any) -> Any:
    """A value as JSON has it: numpy scalars by what they hold, anything unknown as it is."""
    if isinstance(value, tuple | list):
        return [plain(each) for each in value]
    if type(value).__module__ == "numpy" and not getattr(value, "shape", (0,)):
        return value.item()
    return value


def answer(policy: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Call one hook; a hook the policy lacks is the base class's."""
    hook = getattr(policy, call["hook"], None)
    try:
        if hook is None:
            value = getattr(AdaptiveQuantPolicy, call["hook"])(policy, *call["arguments"])
        else:
            value = hook(*call["arguments"])
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    value = plain(value)
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return {"unknown": repr(value)[:200]}
    return {"value": value}


def main() -> None:
    """Serve the policy named on the command line until the caller closes the pipe."""
    source, seed = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w")
    calls = os.fdopen(os.dup(0))
    os.dup2(2, 1)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller ends this process when it stops
    random.seed(int(seed))
    try:
        policy = load(source)
        first: dict[str, Any] = {"value": type(policy).__name__}
    except BaseException as error:  # a policy file may raise anything, SystemExit too
        first = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(first), file=replies, flush=True)
    if "error" in first:
        return
    for line in calls:
        print(json.dumps(answer(policy, json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
