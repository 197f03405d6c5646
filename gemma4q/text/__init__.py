"""Strings and tokens: tokenizer, chat template, stream parsing, sampling. Knows no model."""
