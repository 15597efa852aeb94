"""Model cards written from recorded results."""
