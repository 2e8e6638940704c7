"""torpor: functions in microVMs that fall asleep as snapshots and wake on any node."""

__version__ = "0.1.0"
