"""Runs: their settings, what is made of them, and how a trained one is opened."""
