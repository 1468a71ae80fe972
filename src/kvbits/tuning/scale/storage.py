"""Opening the storage that workers share: a journal file, SQLite or PostgreSQL, through Optuna.

A journal file works on network file systems, where SQLite does not: its lock is a link, which such
file systems make atomically.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvbits.errors import StorageError
from kvbits.tuning.scale.lock import OwnedLock
from kvbits.tuning.search.optuna_samplers import check_optuna

FORMS = "journal:PATH, sqlite:PATH or postgresql://USER@HOST/DATABASE"
BUSY_S = 60  # that SQLite waits for another writer
CONNECT_S = 10
ATTEMPTS = 4  # two hosts that create the tables at the same time get in each other's way


def check_address(address: str) -> None:
    """Check the form of an address without opening it.

    Raises:
        ValueError: It has another form.
        ImportError: Optuna or a database driver is missing.
    """
    scheme, _, rest = address.partition(":")
    has_form = rest.startswith("//") if scheme.startswith("postgresql") else bool(rest)
    if scheme.partition("+")[0] not in _OPENERS or not has_form:
        # Not the address itself, which may hold a password.
        raise ValueError(f"storage must be {FORMS}, got {scheme or 'nothing'!r} before the colon")
    check_optuna("studies with several workers or a storage")
    if scheme.startswith("postgresql"):
        _with_driver(address)


def open_storage(address: str) -> Any:
    """Open a storage of Optuna, and create it where it is new.

    Raises:
        ValueError: The address has no form that is known.
        StorageError: It cannot be reached, or is something else than a storage.
        ImportError: Optuna or a database driver is missing.
    """
    import optuna

    check_address(address)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return _OPENERS[address.partition(":")[0].split("+")[0]](address)


def shown(address: str) -> str:
    """Return an address without its password, and without parameters, which may hold it too."""
    head, separator, tail = address.partition("?")[0].rpartition("@")
    scheme, slashes, user = head.partition("://")
    if not separator or ":" not in user:
        return address.partition("?")[0]
    return f"{scheme}{slashes}{user.partition(':')[0]}:***@{tail}"


def _journal(address: str) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = _path(address)
    try:
        return JournalStorage(JournalFileBackend(str(path), lock_obj=OwnedLock(path)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            f"storage must be a journal of Optuna, got {address}, which holds something else; "
            "name a new file"
        ) from error
    except OSError as error:
        raise _unreachable(address, error) from error


def _sqlite(address: str) -> Any:
    url = f"sqlite:///{_path(address).resolve()}"
    return _database(address, url, {"timeout": BUSY_S})


def _postgresql(address: str) -> Any:
    return _database(address, _with_driver(address), {"connect_timeout": CONNECT_S})


_OPENERS: Mapping[str, Callable[[str], Any]] = {
    "journal": _journal,
    "sqlite": _sqlite,
    "postgresql": _postgresql,
}


def _path(address: str) -> Path:
    path = Path(address.partition(":")[2].removeprefix("///")).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise StorageError(
            f"storage must name a file in an existing folder, got {address}; create the folder"
        )
    return path


def _with_driver(address: str) -> str:
    """Name the installed driver: SQLAlchemy's own choice is psycopg2, where psycopg is newer.

    Raises:
        ImportError: There is none.
    """
    scheme, _, rest = address.partition("://")
    names = [scheme.partition("+")[2]] if "+" in scheme else ["psycopg", "psycopg2"]
    for name in names:
        try:
            __import__(name)
        except ImportError:
            continue
        return f"postgresql+{name}://{rest}"
    raise ImportError(
        f"{names[0]} must be installed for a storage in PostgreSQL, got none; "
        "pip install 'kvbits[postgres]'"
    )


def _database(address: str, url: str, connect: Mapping[str, Any]) -> Any:
    import sqlalchemy
    from optuna.exceptions import StorageInternalError
    from optuna.storages import RDBStorage, get_storage

    settings = {"connect_args": dict(connect), "pool_pre_ping": True}
    for attempt in range(ATTEMPTS):
        try:
            return get_storage(RDBStorage(url, engine_kwargs=settings))
        except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError, RuntimeError) as error:
            if attempt == ATTEMPTS - 1 or _is_final(error):
                raise _unreachable(address, error) from error
            time.sleep(0.2 * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _is_final(error: BaseException) -> bool:
    """Whether another attempt would end the same: tables half made by another host may not."""
    import sqlalchemy

    already = "already exists" in str(error) or "UNIQUE" in str(error)
    integrity = isinstance(error, sqlalchemy.exc.IntegrityError)
    return not (already or integrity or "locked" in str(error))


def _unreachable(address: str, error: BaseException) -> StorageError:
    cause: BaseException = getattr(error, "orig", None) or error.__cause__ or error
    cause = getattr(cause, "orig", None) or cause
    reason = " ".join(str(cause).split())[:200]
    return StorageError(
        f"storage must be one that can be opened, got {shown(address)}: {reason}; "
        "check the address, and that it is running"
    )
