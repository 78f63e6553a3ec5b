"""A small working method of every kind, which `effbench new method` copies under another name."""
