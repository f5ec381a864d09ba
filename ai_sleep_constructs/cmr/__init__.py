"""Contextual memory reweaving: what a model has read beyond its window, kept and read again."""
