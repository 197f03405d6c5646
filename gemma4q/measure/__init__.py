"""How fast, beside what: benchmarks, two builds in turns, and what was measured before."""
