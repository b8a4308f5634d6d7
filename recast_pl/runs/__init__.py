"""The run folder: how a stream fills it, and how it is read again."""
