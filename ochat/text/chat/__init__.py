"""Chat templates in Jinja: rendered as servers do (sandbox.py), read back (rendered.py), those of bases (base.py)."""
