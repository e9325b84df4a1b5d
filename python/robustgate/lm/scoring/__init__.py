"""Experts read documents, and what they say goes into the store."""
