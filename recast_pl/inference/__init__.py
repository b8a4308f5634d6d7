"""Use of trained tasks: prediction, export, server."""
