"""Figures that GRACE adds to `grace-bench figure`."""
