"""Families, budgets and sizes side by side, each run trained alike (docs/compare.md)."""
