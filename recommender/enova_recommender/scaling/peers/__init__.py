"""Reimplemented scaling policies of other systems, behind enova's interface: what its own policy is measured against.

Each is a "reimplemented policy", never the product: the published formula with its published defaults, and one
conservatism knob that is named in its module (1.0: as published; above it spends more GPUs). All see the same
situation, bounds and initial replicas. They know neither hangs nor enova's verdicts: a hung replica whose process
answers counts as ready for them. A policy that knows no variants puts growth on the first listed and takes from the
last.
"""
