"""The command line: parse, call, print."""

from lowrank.cli.app import main

__all__ = ["main"]
