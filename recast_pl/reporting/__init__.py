"""How results look: tables, plots, documents."""
