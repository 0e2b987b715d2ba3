"""Prompts: where they come from, named sets and files of them, and their encoding."""
