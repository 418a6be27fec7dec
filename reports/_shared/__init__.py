"""What the studies share: models and data, facts about the machine, quartiles, tables, and how results are kept.

A study puts this folder's parent on ``sys.path`` and imports from here; nothing in it needs the package to be of any version.
"""
