"""Read records: keys, messages, turns, maps. record_formats.py in the folder above makes conversations of them."""
