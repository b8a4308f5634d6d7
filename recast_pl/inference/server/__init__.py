"""Learnt tasks over HTTP: what is let in, what is classified together, the page; needs the extra `serve`."""
