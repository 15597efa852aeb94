"""Attention and spectra of trained networks (docs/analysis.md)."""
