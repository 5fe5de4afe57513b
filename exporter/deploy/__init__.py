"""Bundles on devices: `agent` runs there, everything else here. Only OpenSSH here and Python there are needed."""
