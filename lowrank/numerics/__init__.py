"""Matrices, moments, factorisations, rounding, the knapsack: arrays only."""
