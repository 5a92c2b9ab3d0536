"""The calls on which operators are proved: one file per module of ``bigbag.ops``, each with a list ``SAMPLES``."""
