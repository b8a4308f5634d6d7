"""YAML configurations of runs."""
