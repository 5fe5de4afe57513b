"""tune: which reduction, how much of it and which precision, for a device under a budget.

`front`, `halving`, `budget` are pure; `journal` is what survives a kill; `measure` knows models; `workers` where it runs; `search` puts
them together.
"""
