"""What a plan costs before anything is built: operations and bytes counted, memory, and the roofline of a device.

`formulas` counts as the papers do, `count` what the modules of a plan really do, `roofline` sets that against a profile.
"""
