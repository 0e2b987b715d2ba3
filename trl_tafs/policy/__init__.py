"""What is trained: the base with its LoRA or as a whole, its optimizer, its copies, its files."""
