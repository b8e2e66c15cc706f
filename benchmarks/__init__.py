"""Programs that measure; nothing imports them but their tests. See README.md beside this file."""
