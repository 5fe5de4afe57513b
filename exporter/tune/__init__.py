"""tune: which reduction, how much of it and which precision, for a device under a budget.

`front`, `survivors`, `halving`, `budget` are pure; `found` is what is found out, `journal` what of it survives a kill; `measure` knows
models; `workers` where it runs; `search` puts them together.
"""
