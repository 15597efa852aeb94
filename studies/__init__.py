"""The paper's questions, asked fairly: comparisons of families, scaling laws, analyses of trained networks."""
