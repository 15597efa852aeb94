"""Tables of README.md and docs/, generated from the records in results/."""
