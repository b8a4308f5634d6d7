"""Trained tasks in use: prediction, export, server."""
