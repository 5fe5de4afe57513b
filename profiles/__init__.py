"""Targets, one TOML each: device, stack, precision, limits, memory and gates. `profiles._schema.load` reads them."""
