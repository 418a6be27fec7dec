"""Rooms that know other libraries; each imports its library only when one of its functions is called."""

from __future__ import annotations
