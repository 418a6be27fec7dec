"""Which modules of a model can be replaced, and why the others cannot."""
