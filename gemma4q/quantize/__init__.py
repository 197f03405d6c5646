"""Quantising: which type each tensor gets, and files in these types."""
