"""From JSONL conversations to packed batches."""
