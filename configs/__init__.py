"""Configs of runs: `--config=demo`. Each says its command, its time and what it reaches."""
