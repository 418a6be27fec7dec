"""The main path: prepare, probe, plan, search, account. Start at :func:`lowrank.compression.compress.compress_model`."""
