"""Requests over time: what runs when, in which memory, and what it said."""
