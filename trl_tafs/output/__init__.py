"""Files, pictures and Markdown tables; knows nothing of training."""
