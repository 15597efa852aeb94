"""Quality of what models write: `prime-v2 quality` (docs/quality.md)."""
