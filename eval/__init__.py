"""Likelihood bounds, perplexity, training and its report, and the command line."""
