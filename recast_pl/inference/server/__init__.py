"""Trained tasks over HTTP: request checks, batching and a web page; needs the extra `serve`."""
