"""From documents to the rows a model is trained on: readers, splits, packing, supervised examples."""
