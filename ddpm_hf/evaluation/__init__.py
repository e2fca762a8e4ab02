"""Figures of a model: likelihood, distances, plots."""
