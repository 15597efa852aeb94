"""Scaling laws from published points and from recorded runs (docs/scaling.md)."""
