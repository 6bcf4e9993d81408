"""Requests, the streams they come from, and the Avalanche benchmark made of them."""
