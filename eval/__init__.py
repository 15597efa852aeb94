"""What is measured: the lm-eval model, likelihood of answers, perplexity, suites and tasks."""
