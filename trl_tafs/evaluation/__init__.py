"""Drawing images for evaluation, held-out evaluation in training, comparing models, results and tables."""
