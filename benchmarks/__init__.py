"""Timings. Every report is of ratios taken in one run."""
