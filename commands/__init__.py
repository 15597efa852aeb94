"""The command `prime-v2`, one file a sub-command."""
