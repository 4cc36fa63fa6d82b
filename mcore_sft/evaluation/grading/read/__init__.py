"""LaTeX in, one form of it out: numbers, units, words, signs."""
