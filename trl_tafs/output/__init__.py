"""What is written: files, pictures, Markdown. Knows nothing of training."""
