"""Runs: their settings, what is made of them, and the folders that they leave."""
