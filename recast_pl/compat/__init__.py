"""All uses of private parts of libraries, one module for each; `tests/test_compat.py` fails when one changes."""
