"""What is published: the push, the model card and its facts, what may not be published, results on cards."""
