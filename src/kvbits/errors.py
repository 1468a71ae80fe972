"""Every exception kvbits raises on purpose.

KVBitsError
├── PlanError                a plan is malformed or does not fit the model
├── UnsupportedModelError    the model has layers or shapes kvbits cannot handle
├── KernelUnavailableError   the requested implementation cannot run here
├── MissingLibraryError      an optional library is not installed
├── CalibrationError         calibration data or states are unusable
├── PolicyError              a replay policy raised an exception or returned what it must not
├── StorageError             a storage that workers share cannot be opened, or was lost
└── RecordError              a stored record or run directory is damaged or from another run

Bad arguments are plain ``ValueError`` and ``TypeError``.
"""

from __future__ import annotations


class KVBitsError(Exception):
    """Base of all errors a caller may want to catch."""


class PlanError(KVBitsError):
    """A plan file is malformed, of a newer schema, or does not fit the model."""


class UnsupportedModelError(KVBitsError):
    """The model, or one of its layers, cannot be run on a packed cache as asked."""


class KernelUnavailableError(KVBitsError):
    """The attention implementation that was asked for cannot run on this machine or shape."""


class MissingLibraryError(KVBitsError, ImportError):
    """A codec needs a library that only an extra of kvbits brings."""


class CalibrationError(KVBitsError):
    """Calibration text is too short, or the captured states are not finite."""


class PolicyError(KVBitsError):
    """A hook of a replay policy raised an exception, or returned what it must not."""


class StorageError(KVBitsError):
    """The storage that workers share cannot be opened, or was lost while they worked."""


class RecordError(KVBitsError):
    """A record, study or saved cache on disk is damaged, incomplete or of something else."""
