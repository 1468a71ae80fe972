"""The tuner: measure how much each layer and side can lose, and choose its bits under a budget."""

from __future__ import annotations

from kvbits.tuning.identity import Data
from kvbits.tuning.progress import Progress, Silent
from kvbits.tuning.settings import TuneSettings
from kvbits.tuning.study import TuneResult, tune

__all__ = ["Data", "Progress", "Silent", "TuneResult", "TuneSettings", "tune"]
