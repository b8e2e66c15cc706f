"""Conversations as text: record formats, templates, tokenizers, chat templates."""
