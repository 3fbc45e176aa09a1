"""Haystacks: text cut into passages, needles put in it, and RULER's tasks."""
