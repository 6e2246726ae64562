"""Ratios against peers and against ourselves; each module is a program that prints its table, then one line of JSON."""
