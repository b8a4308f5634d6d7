"""Configurations of runs: finds and reads YAML, builds model, data and trainer from it, and compares two of them."""
