"""Standalone evaluation of adapters, offline, and reports from run folders."""

from __future__ import annotations

__version__ = "0.1.0"
