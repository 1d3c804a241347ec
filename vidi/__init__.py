"""Vidi 1.5 9B as an independent model, and a golden-tensor parity harness beside it."""

__version__ = "0.1.0"
