"""Figures of finished runs, of streams and of models, drawn by `grace-bench figure`."""
